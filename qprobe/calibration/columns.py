"""Rounding a few columns of a weight to NF4, one after the other, each making up for those before it.

Matrices lie with the columns of the weight first, (columns, rows), so that a column is contiguous. Rows do
not know of each other, so that layers with different inputs may stand side by side. On a GPU one fused kernel
does all columns, and another one searches scales (`qprobe.calibration.columns_cuda`); elsewhere, and where
those do not run, loops do.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from qprobe.system.wording import shortened

CELLS = 4096  # of the table that finds a code on the CPU; no two thresholds come near one cell
MOST_FUSED = 256  # columns of a block whose scale the fused kernel searches: they stay in registers
# Shares of a block's largest value that are tried as its scale. Above 1 the grid's own steps are coarser but
# its outer ones fit better; below 0.6 the largest weights are cut off too much to win (measured on SmolLM2).
RATIOS = tuple(0.6 + 0.1 * i for i in range(7))
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


def spread(scales: Tensor, columns: int) -> Tensor:
    """(columns, rows) the scale of each column: `scales` (k, rows) serve columns / k in a row each."""
    if len(scales) in (1, columns):
        return scales.expand(columns, -1)
    return scales.repeat_interleave(columns // len(scales), dim=0)


def round_columns(
    base: Tensor, own: Tensor, scales: Tensor, coupling: Tensor, widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(codes, errors) of columns that are rounded one by one: int32 and float32, (columns, rows).

    Column i is rounded to the nearest code of base_i + sum over j < i of coupling_ij errors_j, and its error
    is own_i - w-hat_i. base, own: (columns, rows); `base` is used up. scales: (k, rows), see `spread`.
    coupling: (layers, columns, columns), of which only what is below the diagonals counts; `widths` rows
    belong to each.
    """
    grid = nf4_grid(base.device)
    kernels = fused_kernels(base.device) if base.device.type == "cuda" else None
    if kernels is not None:
        return kernels.round_columns(base, own, scales, coupling, tuple(widths), grid)
    bases, owns, each = (x.split(list(widths), dim=1) for x in (base, own, spread(scales, len(base))))
    parts = zip(bases, owns, each, coupling, strict=True)
    found = [one_by_one(b, o, s, c, grid) for b, o, s, c in parts]
    return found[0] if len(found) == 1 else (_joined([c for c, _ in found]), _joined([e for _, e in found]))


def best_scales(values: Tensor, costs: Tensor, widths: Sequence[int]) -> Tensor:
    """(rows,) the scales under which `values` (blocksize, rows) round best to NF4, a block each row.

    costs: (layers, blocksize), of a squared error; `widths` rows belong to each.
    """
    kernels = fused_kernels(values.device) if values.device.type == "cuda" else None
    if kernels is not None and len(values) <= MOST_FUSED:
        return kernels.best_scales(values, costs, tuple(widths), nf4_grid(values.device))
    parts = zip(values.split(list(widths), dim=1), costs, strict=True)
    return torch.cat([searched_scales(part, cost[:, None]) for part, cost in parts])


def searched_scales(values: Tensor, costs: Tensor) -> Tensor:
    """(blocks,) scales under which `values` (blocksize, blocks) round best to NF4, by a loop.

    costs: (blocksize, blocks) or (blocksize, 1), of a squared error. For each candidate of `RATIOS` the
    values are rounded to nearest, and the scale is the one that fits these codes best (least squares); of the
    candidates the one with the least error wins.
    """
    grid = nf4_grid(values.device)
    largest = values.abs().amax(dim=0)
    weighted = values * costs
    best, chosen = torch.zeros_like(largest), largest.clone()
    for ratio in RATIOS:
        rounded = grid.read(grid.nearest(values * inverse(largest * ratio)))
        along = (rounded * weighted).sum(dim=0)
        energy = rounded.mul_(rounded).mul_(costs).sum(dim=0)
        # The error is sum(costs values^2) - along^2 / energy at the best scale, along / energy.
        gain = along.square() * inverse(energy)
        is_better = (gain > best) & (along > 0)
        best = torch.where(is_better, gain, best)
        chosen = torch.where(is_better, along * inverse(energy), chosen)
    return chosen


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=1)


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


class Kernels(Protocol):
    """What `qprobe.calibration.columns_cuda` has in place of the loops; see those of the same name."""

    def round_columns(
        self, base: Tensor, own: Tensor, scales: Tensor, coupling: Tensor, widths: tuple[int, ...], grid: Grid
    ) -> tuple[Tensor, Tensor]: ...

    def best_scales(self, values: Tensor, costs: Tensor, widths: tuple[int, ...], grid: Grid) -> Tensor: ...


@cache
def fused_kernels(device: torch.device) -> Kernels | None:
    """The kernels for `device`, tried out on a few columns; None, with a warning, where they do not run."""
    kernels = None
    try:
        from qprobe.calibration import columns_cuda

        kernels = columns_cuda
        why = _disagreement(kernels, device)
    except Exception as error:  # no Triton, no C compiler, a card or driver that it does not know: many kinds
        why = f"{type(error).__name__}: {error}"
    if why:
        warnings.warn(
            f"The fused kernels for calibration do not run on {device} "
            f"({shortened(why.splitlines()[0], 200)}); without them calibration takes several times as long.",
            stacklevel=2,
        )
    return None if why else kernels


def _disagreement(kernels: Kernels, device: torch.device) -> str:
    """In what the kernels differ from the loops on a few columns; "" if they agree."""
    grid = nf4_grid(device)
    given = torch.linspace(-1, 1, 64, device=device).reshape(2, 32)
    scales, coupling = torch.ones_like(given), torch.full((1, 2, 2), 0.25, device=device)
    found, _ = kernels.round_columns(given.clone(), given, scales, coupling, (32,), grid)
    if not torch.equal(found, one_by_one(given.clone(), given, scales, coupling[0], grid)[0]):
        return "codes differ"
    costs = torch.ones((1, 2), device=device)
    searched = kernels.best_scales(given, costs, (32,), grid)
    agrees = torch.allclose(searched, searched_scales(given, costs.T), rtol=1e-4, atol=0)
    return "" if agrees else "scales differ"
