"""The NF4 grid: its values, the thresholds between them, and the scales that a block tries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CELLS = 4096  # of the table that finds a code on the CPU; no two thresholds come near one cell
FEW = 2048  # numbers up to which a search is quicker than a table: 2 us for 64 of them, not 60
# Shares of a block's largest value that are tried as its scale. Above 1 the grid's own steps are coarser but
# its outer ones fit better; below 0.6 the largest weights are cut off too much to win (measured on SmolLM2).
RATIOS = tuple(0.6 + 0.1 * i for i in range(7))


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
        if x.device.type != "cpu" or x.numel() <= FEW:
            return torch.bucketize(x, self.thresholds, out_int32=True, out=out)
        codes = self._looked_up(x)
        return codes if out is None else out.copy_(codes)

    def _looked_up(self, x: Tensor) -> Tensor:
        # The same, twenty times as fast for many on a CPU: look up the cell, compare with one threshold.
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
