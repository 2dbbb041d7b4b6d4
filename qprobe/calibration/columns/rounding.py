"""Rounding a few columns of a weight to NF4, one after the other, each making up for those before it.

Matrices lie with the columns of the weight first, (columns, rows), so that a column is contiguous. Rows do
not know of each other, so that layers with different inputs may stand side by side. On a GPU one fused kernel
does all columns, and another one searches scales (`qprobe.calibration.columns.cuda`); on a CPU a compiled
loop does the columns (`qprobe.calibration.columns.cpu`). Where those do not run, loops of PyTorch's
operations do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from qprobe.calibration.columns.grid import RATIOS, Grid, nf4_grid
from qprobe.system.wording import shortened

MOST_FUSED = 256  # columns of a block whose scale the fused kernel searches: they stay in registers
LEAF = 32  # columns between which errors go one by one; beyond, a matrix product is faster (CPU, SmolLM2)


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
    kernels = fused_kernels(base.device)
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
    search = fused_search(values.device)
    if search is not None and len(values) <= MOST_FUSED:
        return search(values, costs, tuple(widths), nf4_grid(values.device))
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
    parts = (base, inverses, own, scales, codes, errors)
    columns = list(zip(*(x.unbind() for x in parts), strict=True))  # of few rows indexing takes longest
    for start in range(0, len(base), LEAF):
        end = min(start + LEAF, len(base))
        if start:
            base[start:end].addmm_(coupling[start:end, :start], errors[:start])
        for i in range(start, end):
            wanted, inverted, value, scale, code, error = columns[i]
            grid.nearest(wanted * inverted, code)
            torch.addcmul(value, grid.read(code), scale, value=-1, out=error)
            base[i + 1 : end].addr_(coupling[i + 1 : end, i], error)
    return codes, errors


Search = Callable[[Tensor, Tensor, tuple[int, ...], Grid], Tensor]
"""A kernel for `best_scales`."""


class Kernels(Protocol):
    """What `columns.cuda` and `columns.cpu` have in place of the loops; see those of the same name."""

    def round_columns(
        self, base: Tensor, own: Tensor, scales: Tensor, coupling: Tensor, widths: tuple[int, ...], grid: Grid
    ) -> tuple[Tensor, Tensor]: ...

    @property
    def best_scales(self) -> Search | None:
        """None where the loop is as fast."""
        ...


def fused_search(device: torch.device) -> Search | None:
    """The kernel for `best_scales` on `device`; None where there is none, or it does not run."""
    kernels = fused_kernels(device)
    return None if kernels is None else kernels.best_scales


@cache
def fused_kernels(device: torch.device) -> Kernels | None:
    """The kernels for `device`, tried out on a few columns; None, with a warning, where they do not run."""
    kernels: Kernels | None = None
    try:
        if device.type == "cpu":
            from qprobe.calibration.columns import cpu as module
        else:
            from qprobe.calibration.columns import cuda as module

        kernels = module
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
    if kernels.best_scales is None:
        return ""
    costs = torch.ones((1, 2), device=device)
    searched = kernels.best_scales(given, costs, (32,), grid)
    agrees = torch.allclose(searched, searched_scales(given, costs.T), rtol=1e-4, atol=0)
    return "" if agrees else "scales differ"
