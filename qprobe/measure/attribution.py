"""Sensitivity: the share of the all-4-bit KL that each linear causes, by path attribution.

Along the straight path from W to W-hat in all quantized linears, KL(alpha) has the slope
sum_l <dKL/dW_l, D_l>, so the integrals a_l = int_0^1 <dKL/dW_l, D_l> d(alpha) sum to KL(1) exactly.
<dKL/dW_l, D_l> = sum_t <g_t, D_l x_t> needs no weight gradient: each linear computes
    y = (W + (alpha + s) D) x + b      with s = 0 for each sample,
and the slope for one sample is dKL/ds. W + alpha D is rounded once to the model's dtype; adding alpha D x
to an already rounded W x would lose its small elements. A special case of integrated gradients
(Sundararajan, Taly, Yan 2017, "Axiomatic Attribution for Deep Networks"), integrated by
Gauss-Legendre quadrature.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprobe.measure.hooks import checkpointed_blocks, replaced_forwards
from qprobe.measure.kl import answer_logits, kl_per_sample
from qprobe.measure.outputs import split_by_sample
from qprobe.measure.roundtrips import RoundTrips
from qprobe.samples.inputs import Batch


def gauss_legendre(nodes: int) -> list[tuple[float, float]]:
    """(alpha, weight) of the `nodes`-point rule on [0, 1]; the weights sum to 1."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return [(float(p) / 2 + 0.5, float(w) / 2) for p, w in zip(points, weights, strict=True)]


def slopes_at(
    model: Any,
    batch: Batch,
    reference: list[Tensor],
    modules: dict[str, nn.Linear],
    round_trips: RoundTrips,
    alpha: float,
) -> dict[str, Tensor]:
    """For each linear the slope <dKL/dW, D> at W + alpha D: (samples,) float64, nats over all answer tokens.

    reference: the 16-bit model's `answer_logits` of the batch. modules: the linears that are quantized.
    A linear that did not run, or whose rows cannot be told apart by sample, is missing.
    """
    steps: dict[str, Tensor] = {}

    def forward(name: str, module: nn.Linear, x: Tensor) -> Tensor:
        if split_by_sample(x, batch.size) is None:
            return F.linear(x, round_trips.between(name, alpha), module.bias)
        if name not in steps:
            steps[name] = torch.zeros(batch.size, dtype=torch.float32, device=x.device, requires_grad=True)
        return _PathLinear.apply(x, steps[name], module.bias, round_trips, name, alpha)

    with torch.enable_grad(), checkpointed_blocks(model), replaced_forwards(modules, forward):
        kl = kl_per_sample(reference, answer_logits(model, batch)).sum()
        names = list(steps)
        gradients = torch.autograd.grad(kl, [steps[n] for n in names], allow_unused=True)
    return {n: g.double() for n, g in zip(names, gradients, strict=True) if g is not None}


class _PathLinear(torch.autograd.Function):
    """x (W + (alpha + step) D)^T + b at step = 0, one step a sample.

    The gradient for a step is sum_t <g_t, D x_t> over that sample's tokens, in float32. Unpacking the 4-bit
    weight again in the backward pass is cheaper than keeping D.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        bias: Tensor | None,
        round_trips: RoundTrips,
        name: str,
        alpha: float,
    ) -> Tensor:
        weight = round_trips.between(name, alpha)
        ctx.save_for_backward(x, weight)
        ctx.samples, ctx.round_trips, ctx.name = step.numel(), round_trips, name
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        error = F.linear(x, ctx.round_trips.difference(ctx.name, x.dtype))
        per_sample = (grad * error).reshape(ctx.samples, -1).sum(dim=1, dtype=torch.float32)
        towards_x = grad @ weight if ctx.needs_input_grad[0] else None
        return towards_x, per_sample, None, None, None, None


def attribute(
    model: Any,
    batch: Batch,
    reference: list[Tensor],
    modules: dict[str, nn.Linear],
    round_trips: RoundTrips,
    nodes: int,
) -> pd.DataFrame:
    """a_l of each sample and linear: the columns of the unit stage "sensitivity".

    sample, layer, answer_tokens, kl_sum (nats summed over the sample's answer tokens).

    Cost: one forward and one backward pass, with the forward repeated inside it, for each node.
    """
    totals: dict[str, Tensor] = {}
    for alpha, weight in gauss_legendre(nodes):
        for name, slope in slopes_at(model, batch, reference, modules, round_trips, alpha).items():
            totals[name] = totals.get(name, torch.zeros_like(slope)) + weight * slope
    rows = [
        (sample.id, name, end - start, value)
        for name, total in totals.items()
        for sample, (start, end), value in zip(batch.samples, batch.answers, total.tolist(), strict=True)
        if end > start
    ]
    return pd.DataFrame(rows, columns=["sample", "layer", "answer_tokens", "kl_sum"])
