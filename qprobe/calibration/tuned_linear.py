"""A 4-bit linear whose block scales, and codes, are moved by gradients.

A code moves as a number in [0, 15], its unit: what is read is the value of the nearest code, and the gradient
is that of the line between the two values around it (a straight-through estimate, Bengio et al. 2013). Half
way between two codes is half way between their values, where bitsandbytes changes from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qprobe.calibration.columns.grid import nf4_grid
from qprobe.calibration.columns.rounding import inverse
from qprobe.formats.nf4 import PackedNf4
from qprobe.measure.experts.routing import owned

LAST = 15  # the largest code


@dataclass(frozen=True)
class Tunable:
    """One weight under way. packed: as when tuning began; units: (n,) of its codes, None where those stay."""

    packed: PackedNf4
    units: Tensor | None = None

    def weight(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """(out_features, in_features) what is read under `scales` (blocks,), in `dtype`."""
        if self.units is None:
            return self.packed.scaled(scales, dtype)
        values = self.values().mul_(self.spread(scales))
        return values.view(self.packed.state.shape).to(dtype)

    def values(self) -> Tensor:
        """(n,) the values of the codes in [-1, 1]."""
        if self.units is None:
            ones = torch.ones_like(self.packed.state.absmax)
            return self.packed.scaled(ones, torch.float32).reshape(-1)
        return nf4_grid(self.units.device).read(nearest_codes(self.units.detach()))

    def spread(self, scales: Tensor) -> Tensor:
        """(n,) of each weight the one of `scales` (blocks,) that is its block's."""
        return scales.repeat_interleave(self.packed.state.blocksize)[: self.count]

    def by_block(self, values: Tensor) -> Tensor:
        """(blocks,) sums of `values` (n,)."""
        size = self.packed.state.blocksize
        missing = -len(values) % size
        whole = F.pad(values, (0, missing)) if missing else values  # which copies, also for nothing
        return whole.view(-1, size).sum(dim=1)

    @property
    def count(self) -> int:
        return self.packed.state.shape.numel()


def nearest_codes(units: Tensor) -> Tensor:
    """int32 codes of `units`, of the same shape."""
    return units.round().clamp_(0, LAST).int()


def units_of(weight: Tensor, codes: Tensor, scales: Tensor, slack: float) -> Tensor:
    """(n,) where the numbers of `weight` lie among the codes, but within `slack` of the code that each has.

    weight, codes, scales: (n,) each, the scale of each weight among them.
    """
    values = nf4_grid(weight.device).values
    relative = weight.float() * inverse(scales)
    below = (torch.bucketize(relative, values, right=True) - 1).clamp_(0, LAST - 1)
    units = below + (relative - values[below]) / (values[below + 1] - values[below])
    return torch.minimum(torch.maximum(units, codes - slack), codes + slack)


class TunedLinear(torch.autograd.Function):
    """x W-hat^T + b, differentiable in x, block scales and units; keeps no weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor, units: Tensor | None, packed: PackedNf4, bias: Tensor | None
    ) -> Tensor:
        """x (..., in_features); scales (blocks,) float32; units, packed: see `Tunable`."""
        ctx.save_for_backward(x, scales)
        ctx.tunable = Tunable(packed, None if units is None else units.detach())
        return owned(F.linear(x, ctx.tunable.weight(scales, x.dtype), bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, scales and units (None where it has none), by `grad` (..., out_features)."""
        x, scales = ctx.saved_tensors
        tunable: Tunable = ctx.tunable
        towards_weight = (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).float().reshape(-1)
        by_block = tunable.by_block(towards_weight * tunable.values())
        towards_units = None
        if tunable.units is not None:
            values = nf4_grid(x.device).values
            below = tunable.units.floor().clamp_(0, LAST - 1).long()
            towards_units = towards_weight.mul_(values[below + 1] - values[below])
            towards_units.mul_(tunable.spread(scales))
        towards_x = grad @ tunable.weight(scales, x.dtype) if ctx.needs_input_grad[0] else None
        return towards_x, by_block, towards_units, None, None
