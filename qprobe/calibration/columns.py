"""Rounding a few columns of a weight to NF4, one after the other, each making up for those before it.

Matrices lie with the columns of the weight first, (columns, rows), so that a column is contiguous. Rows do
not know of each other. On a GPU one fused kernel does all columns (`qprobe.calibration.columns_cuda`);
elsewhere, and where that does not run, a loop does five operations a column.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

CELLS = 4096  # of the table that finds a code on the CPU; no two thresholds come near one cell
LEAF = 32  # columns between which errors go one by one; beyond, a matrix product is faster (CPU, SmolLM2)


@dataclass(frozen=True)
class Grid:
    """The 16 NF4 values, ascending in [-1, 1], and the 15 thresholds between them, as bitsandbytes has them.

    below: for each of `CELLS` cells of [-1, 1] the code just left of it. next_threshold: the one above a
    code.
    """

    values: Tensor
    thresholds: Tensor
    below: Tensor
    next_threshold: Tensor

    def nearest(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """int32 codes of the values nearest to `x`; a tie goes to the smaller value, as in bitsandbytes.

        out: where to write them as well, int32 of the shape of `x`.
        """
        if x.device.type != "cpu":
            return torch.bucketize(x, self.thresholds, out_int32=True, out=out)
        codes = self._looked_up(x)
        return codes if out is None else out.copy_(codes)

    def _looked_up(self, x: Tensor) -> Tensor:
        # The same, twenty times as fast on a CPU: look up the cell, then compare with one threshold.
        cell = ((x.clamp(-1, 1) + 1) * (CELLS / 2)).int().clamp_(0, CELLS - 1)
        code = self.below.index_select(0, cell.view(-1)).view(x.shape)
        return code + (x > self.next_threshold.index_select(0, code.view(-1)).view(x.shape))

    def read(self, codes: Tensor) -> Tensor:
        """The values of int32 `codes`."""
        return self.values.index_select(0, codes.view(-1)).view(codes.shape)


@cache
def nf4_grid(device: torch.device) -> Grid:
    """The grid on `device`, float32."""
    from bitsandbytes.functional import get_4bit_type

    values = get_4bit_type("nf4", device="cpu").double()
    thresholds = ((values[1:] + values[:-1]) / 2).float()
    # One cell further left than the cell's own edge, so that rounding of its number does no harm.
    edges = torch.arange(-1, CELLS - 1).double() / (CELLS / 2) - 1
    below = torch.bucketize(edges.float(), thresholds, out_int32=True)
    last = torch.full((1,), float("inf"))
    parts = (values.float(), thresholds, below, torch.cat([thresholds, last]))
    return Grid(*(x.to(device) for x in parts))


def inverse(scales: Tensor) -> Tensor:
    """1 / `scales`, and 0 for 0: a block of scale 0 reads back as zeros whatever its codes."""
    return torch.where(scales == 0, 0.0, 1 / scales)


def round_columns(base: Tensor, own: Tensor, scales: Tensor, coupling: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, errors) of columns that are rounded one by one: int32 and float32, (columns, rows).

    Column i is rounded to the nearest code of base_i + sum over j < i of coupling_ij errors_j, and its error
    is own_i - w-hat_i. base, own: (columns, rows); `base` is used up. scales: the same shape, maybe expanded.
    coupling: (columns, columns), of which only what is below the diagonal counts.
    """
    grid = nf4_grid(base.device)
    kernel = fused_kernel(base.device) if base.device.type == "cuda" else None
    if kernel is not None:
        return kernel(base, own, scales, coupling, grid)
    return one_by_one(base, own, scales, coupling, grid)


def one_by_one(
    base: Tensor, own: Tensor, scales: Tensor, coupling: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """`round_columns` by a loop over the columns."""
    inverses = inverse(scales)
    codes, errors = torch.empty_like(own, dtype=torch.int32), torch.empty_like(own)
    for start in range(0, len(base), LEAF):
        end = min(start + LEAF, len(base))
        if start:
            base[start:end].addmm_(coupling[start:end, :start], errors[:start])
        for i in range(start, end):
            code = grid.nearest(base[i] * inverses[i], codes[i])
            torch.addcmul(own[i], grid.read(code), scales[i], value=-1, out=errors[i])
            base[i + 1 : end].addr_(coupling[i + 1 : end, i], errors[i])
    return codes, errors


@cache
def fused_kernel(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The kernel for `device`, tried out on a few columns; None, with a warning, where it does not run."""
    grid = nf4_grid(device)
    given = torch.linspace(-1, 1, 64, device=device).reshape(2, 32)
    inputs: tuple[Any, ...] = (given, torch.ones_like(given), torch.full((2, 2), 0.25, device=device), grid)
    kernel = None
    try:
        from qprobe.calibration.columns_cuda import fused

        kernel = fused
        found = kernel(given.clone(), *inputs)
        agrees = torch.equal(found[0], one_by_one(given.clone(), *inputs)[0])
        why = "its codes differ"
    except Exception as error:  # no Triton, no C compiler, a card or driver that it does not know: many kinds
        agrees, why = False, f"{type(error).__name__}: {error}"
    if not agrees:
        warnings.warn(
            f"The fused kernel for calibration does not run on {device} ({why.splitlines()[0][:200]}); "
            "without it calibration takes several times as long.",
            stacklevel=2,
        )
    return kernel if agrees else None
