"""Sensitivity: the share of the all-4-bit KL that each linear causes, by path attribution.

Along the straight path from W to W-hat in all quantized linears, KL(alpha) has the slope
sum_l <dKL/dW_l, D_l>, so the integrals a_l = int_0^1 <dKL/dW_l, D_l> d(alpha) sum to KL(1) exactly.
<dKL/dW_l, D_l> = sum_t <g_t, D_l x_t> needs no weight gradient: each linear computes
    y = (W + (alpha + s) D) x + b      with s = 0 for each sample,
and the slope for one sample is dKL/ds. A special case of integrated gradients
(Sundararajan, Taly, Yan 2017, "Axiomatic Attribution for Deep Networks"). The slope at alpha = 0 is known
without a pass: the KL has its minimum there, so it is 0. Gauss-Radau quadrature takes that end as a node of
its own and is exact for one degree more than Gauss-Legendre at the same cost.

A pass at alpha = 0 is not wasted, though. There the KL has no slope but a curvature, and 1/2 d2KL/ds2 of one
layer is the KL of that layer alone in 4-bit, to second order: what `isolated_kl` estimates.

The two models differ by little, and 16-bit rounding of activations drowns that in noise where the KL
is small (10 % of it on a model with a KL of 0.001). So the path is walked in float32, weights as they
are stored, except for models so large that their activations would not fit (`path_dtype`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import fsum
from typing import Any

import pandas as pd
import torch
from scipy.special import roots_sh_jacobi
from torch import Tensor, nn

from qprobe.inputs.batch import Batch
from qprobe.loading.experts.weights import Layer
from qprobe.measure.dequantized import DequantizedWeights
from qprobe.measure.experts.routing import (
    Product,
    by_sample,
    has_samples_behind,
    matmul,
    owned,
    samples_apart,
    times,
    towards_input,
)
from qprobe.measure.hooks import ROOM_BYTES, checkpointed_blocks, replaced_forwards
from qprobe.measure.kl import KlSums, Readout, read_out, readout_of
from qprobe.runs.key import RESIDUAL

FLOAT32_UP_TO = 2_500_000_000  # parameters: in 16-bit, float32 and 4-bit together 16 GB, for a 24 GB card
SMALLEST_KL = 1e-3  # nats an answer token: a batch below it is held to the same absolute error as one at it
BY_SAMPLE = 5  # times as much may be missed by samples one by one, whose errors cancel in every mean
MOST_NODES = 8
NEAR = 1 / 16  # of the path, where weights move by about one step of bfloat16
FLOAT16_SCALE = 2.0**12  # of the loss: gradients of a small KL lie below float16's smallest numbers


def gauss_radau(nodes: int) -> list[tuple[float, float]]:
    """(alpha, weight) of the rule on [0, 1] for a function that is 0 at 0, exact up to degree 2 x `nodes`.

    The points of Gauss-Radau quadrature but for its fixed one at 0. With f = alpha h they are those of the
    Gauss-Jacobi rule for h under the weight alpha (Davis, Rabinowitz 1984, "Methods of Numerical
    Integration", section 2.7).
    """
    points, weights = roots_sh_jacobi(nodes, 2, 2)
    return [(float(p), float(w / p)) for p, w in zip(points, weights, strict=True)]


@dataclass(frozen=True)
class Path:
    """The straight path between a model (alpha = 0) and its all-4-bit form (alpha = 1).

    modules: the linears that are quantized. dtype: in which the path is walked; open `walking` around it.
    room_bytes: what a backward pass may keep to run faster, see `checkpointed_blocks`. texts: names of those
    that read texts. shared: of those that read rows which belong to no sample.
    """

    model: Any
    modules: dict[str, Layer]
    dequantized: DequantizedWeights
    dtype: torch.dtype
    room_bytes: int = ROOM_BYTES
    texts: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()

    @cached_property
    def readout(self) -> Readout:
        """What damage is measured on."""
        found = readout_of(self.model)
        assert found is not None, type(self.model).__name__
        return found

    def logits(self, batch: Batch, alpha: float) -> list[Tensor]:
        """`read_out` at W + alpha D, without gradients."""

        def forward(name: str, product: Product, x: Tensor) -> Tensor:
            return times(product, x.to(self.dtype), self.dequantized.between(name, alpha, self.dtype))

        with torch.no_grad(), replaced_forwards(self.modules, forward):
            return read_out(self.model, batch)

    def slopes(self, batch: Batch, reference: list[Tensor], alpha: float) -> dict[str, Tensor]:
        """For each linear the slope <dKL/dW, D> at W + alpha D: (samples,) float64 on the CPU, in nats.

        Summed over answer tokens. reference: the answer logits at alpha = 0. A linear that did not run,
        or whose rows cannot be told apart by sample, is missing.
        """
        return self._gradients(batch, alpha, lambda rows: self.readout.damage(reference, rows))

    def isolated_kl(self, batch: Batch) -> dict[str, Tensor]:
        """For each linear an unbiased estimate of 1/2 d2KL/ds2 at alpha = 0: (samples,) float64, in nats.

        d2KL/ds2 = sum_t j_t^T (diag p_t - p_t p_t^T) j_t with j_t = d logits_t / ds, the Fisher information
        of the step s. With independent random signs e, c = sqrt(p) e - p sum(sqrt(p) e) has that matrix as
        its covariance, so the square of d(sum_t c_t logits_t)/ds estimates it (Hutchinson 1990; Martens 2020,
        "New Insights and Perspectives on the Natural Gradient Method"). The signs come from the sample alone,
        whatever batch it is in.
        """

        def projected(logits: list[Tensor]) -> Tensor:
            weights = [
                direction(self.readout, z.detach(), sample.digest)
                for z, sample in zip(logits, batch.samples, strict=True)
            ]
            return torch.stack([(c * z).double().sum() for c, z in zip(weights, logits, strict=True)])

        return {name: g.square() / 2 for name, g in self._gradients(batch, 0.0, projected).items()}

    def _gradients(
        self, batch: Batch, alpha: float, loss: Callable[[list[Tensor]], Tensor]
    ) -> dict[str, Tensor]:
        """d loss / ds of each linear at W + alpha D: (samples,) float64; `loss`: logits -> (samples,)."""
        steps: dict[str, Tensor] = {}

        def forward(name: str, product: Product, x: Tensor) -> Tensor:
            x = x.to(self.dtype)
            if name in self.shared or not samples_apart(product, x, batch.size):
                return times(product, x, self.dequantized.between(name, alpha, self.dtype))
            if name not in steps:
                steps[name] = torch.zeros(batch.size, device=x.device, requires_grad=True)
            if name in self.texts and has_samples_behind(product, x, batch.size):
                turned = _PathLayer.apply(
                    x.transpose(0, 1), steps[name], product, self.dequantized, name, alpha
                )
                return turned.transpose(0, 1).contiguous()
            return _PathLayer.apply(x, steps[name], product, self.dequantized, name, alpha)

        keeping = checkpointed_blocks(self.model, self.room_bytes)
        with torch.enable_grad(), keeping, replaced_forwards(self.modules, forward):
            scale = FLOAT16_SCALE if self.dtype == torch.float16 else 1.0
            total = scale * loss(read_out(self.model, batch)).sum()
            names = list(steps)
            gradients = torch.autograd.grad(total, [steps[n] for n in names], allow_unused=True)
        found = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
        return {n: g / scale for n, g in on_host(found).items()}

    def integrals(self, batch: Batch, reference: list[Tensor], nodes: int) -> dict[str, Tensor]:
        """a_l of each linear by `gauss_radau`: (samples,) float64, nats over all answer tokens."""
        totals: dict[str, Tensor] = {}
        for alpha, weight in gauss_radau(nodes):
            for name, slope in self.slopes(batch, reference, alpha).items():
                totals[name] = totals.get(name, torch.zeros_like(slope)) + weight * slope
        return totals


def on_host(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`values`, of one shape, in float64 on the CPU; one copy from each device that they are on."""
    by_device: dict[torch.device, list[str]] = {}
    for name, value in values.items():
        by_device.setdefault(value.device, []).append(name)
    copied: dict[str, Tensor] = {}
    for names in by_device.values():
        copied |= zip(names, torch.stack([values[n] for n in names]).cpu().double(), strict=True)
    return {name: copied[name] for name in values}


def fisher_direction(reference: Tensor, seed: str) -> Tensor:
    """(tokens, vocabulary) random weights of covariance diag(p) - p p^T, p = softmax of `reference`.

    That is the Fisher information of the logits. seed: hexadecimal digits, of which the first 15 count.
    """
    return _fisher_root(reference, random_signs(reference, seed))


def direction(readout: Readout, reference: Tensor, seed: str) -> Tensor:
    """Random weights of the rows `reference` whose covariance is the Hessian of the readout's damage there.

    Of KL that is the Fisher information of the logits, of a squared error the identity times 2 over the
    square of the row.
    """
    if not readout.by_distance:
        return fisher_direction(reference, seed)
    signs = random_signs(reference, seed)
    return signs * (2 / reference.square().sum(dim=-1, keepdim=True)).sqrt()


def random_signs(reference: Tensor, seed: str) -> Tensor:
    """Random signs of the shape of `reference`, the same for the same `seed` on the same kind of device."""
    generator = torch.Generator(reference.device).manual_seed(int(seed[:15], 16))
    return torch.randint(0, 2, reference.shape, generator=generator, device=reference.device) * 2.0 - 1.0


def _fisher_root(reference: Tensor, signs: Tensor) -> Tensor:
    """(tokens, vocabulary) weights of covariance diag(p) - p p^T over `signs`, p = softmax of `reference`."""
    p = reference.softmax(dim=-1)
    spread = p.sqrt() * signs
    return spread - p * spread.sum(dim=-1, keepdim=True)


@contextmanager
def walking(path: Path) -> Iterator[None]:
    """While open, the model's narrower parameters and buffers are in the path's dtype.

    But for streamed weights, which are widened one at a time when they are used.
    """
    streamed = {id(path.dequantized.modules[name].weight) for name in path.dequantized.streamed}
    held = [p for p in (*path.model.parameters(), *path.model.buffers()) if id(p) not in streamed]
    saved = [(p, p.data) for p in held if p.is_floating_point() and p.itemsize < path.dtype.itemsize]
    try:
        for parameter, data in saved:
            parameter.data = data.to(path.dtype)
        yield
    finally:
        for parameter, data in saved:
            parameter.data = data


def path_dtype(model: nn.Module) -> torch.dtype:
    """float32 up to `FLOAT32_UP_TO` parameters, else the model's own dtype."""
    count = sum(p.numel() for p in model.parameters())
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.float32 if count <= FLOAT32_UP_TO else own


class _PathLayer(torch.autograd.Function):
    """x (W + (alpha + step) D)^T + b at step = 0, one step a sample.

    The gradient for a step is sum_t <g_t, D x_t> over that sample's tokens, in float32. The weights that are
    saved live for one block only where blocks are checkpointed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        product: Product,
        dequantized: DequantizedWeights,
        name: str,
        alpha: float,
    ) -> Tensor:
        """x (..., in_features) of all samples; step (samples,); the output (..., out_features)."""
        own = dequantized.own(name).to(x.dtype)
        # At the 16-bit end the 4-bit weight is needed by the backward pass alone.
        ctx.difference = partial(dequantized.difference, name, x.dtype)
        difference = ctx.difference() if alpha else None
        weight = own if difference is None else torch.add(own, difference, alpha=alpha)
        ctx.save_for_backward(x, weight, difference)
        ctx.samples, ctx.product = step.numel(), product
        return owned(times(product, x, weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, difference = ctx.saved_tensors
        error = matmul(ctx.product, x, ctx.difference() if difference is None else difference)
        # float16 has no room for products of small numbers; bfloat16 has, and half the bytes of float32.
        slopes = grad.float() * error.float() if grad.dtype == torch.float16 else grad * error
        per_sample = by_sample(ctx.product, slopes, ctx.samples)
        towards_x = towards_input(ctx.product, grad, weight) if ctx.needs_input_grad[0] else None
        return towards_x, per_sample, None, None, None, None


@dataclass(frozen=True)
class Attribution:
    """What each linear contributes to the KL of one batch.

    rows: columns of the unit stage "sensitivity". kl: `KlSums` of each sample at alpha = 1. nodes: used.
    """

    rows: pd.DataFrame
    kl: list[KlSums]
    nodes: int


Ends = tuple[list[Tensor], list[Tensor]]  # answer logits of the 16-bit model and of the all-4-bit model


def attribute(
    path: Path, batch: Batch, nodes: int, tolerance: float = RESIDUAL, ends: Ends | None = None
) -> Attribution:
    """a_l of each sample and linear of the batch, and the KL that they sum to.

    nodes: of `gauss_radau`, without the one at 0, which costs nothing.
    ends: where both ends of the path are known already in its dtype; None to compute them (two forwards).

    Where the sums miss the KL of the batch by more than `tolerance` of it (or of `SMALLEST_KL`), or that of
    its samples by `BY_SAMPLE` times as much, the path bends more than `nodes` can follow: it is walked again
    with four times as many, up to `MOST_NODES`. What rounding to 16-bit adds to the KL is no part of any sum
    (see `rounding_floor`), and no reason to. Each node costs a forward and a backward pass, the forward
    partly repeated inside it where the model is large.
    """
    batch = batch.in_dtype(path.dtype)
    with walking(path):
        reference, four_bit = ends or (path.logits(batch, 0.0), path.logits(batch, 1.0))
        kl = path.readout.sums(reference, four_bit)
        wanted = [k.kl for k in kl]
        allowed = tolerance * max(fsum(wanted), SMALLEST_KL * sum(k.tokens for k in kl))
        best = last = _walk(path, batch, reference, nodes)
        if path.dtype != torch.float32 and not last.is_within(wanted, allowed):
            floor = rounding_floor(path, batch, reference, wanted)
            wanted = [value - low for value, low in zip(wanted, floor, strict=True)]
        while not last.is_within(wanted, allowed) and last.nodes < MOST_NODES:
            last = _walk(path, batch, reference, min(4 * last.nodes, MOST_NODES))
            is_rounding = last.missed(wanted) > best.missed(wanted) and path.dtype != torch.float32
            best = min(best, last, key=lambda walk: walk.missed(wanted))
            if is_rounding:
                break
    return Attribution(rows_by_sample(path.readout, batch, best.integrals), kl, best.nodes)


def rows_by_sample(readout: Readout, batch: Batch, values: Mapping[str, Tensor]) -> pd.DataFrame:
    """Columns sample, layer, answer_tokens, kl_sum of `values`: (samples,) damage for each layer.

    Samples without a row of the readout, such as an answer token, have none here.
    """
    counts = readout.counts(batch)
    rows = [
        (sample.id, name, count, value)
        for name, one in values.items()
        for sample, count, value in zip(batch.samples, counts, one.tolist(), strict=True)
        if count
    ]
    return pd.DataFrame(rows, columns=["sample", "layer", "answer_tokens", "kl_sum"])


def rounding_floor(path: Path, batch: Batch, reference: list[Tensor], kl: Sequence[float]) -> list[float]:
    """The part of the KL of each sample that rounding to 16-bit adds anywhere on the path, in nats.

    Two runs whose weights differ by ever so little round their activations differently, so the KL jumps from
    0 to this floor where the path begins, which no gradient sees: 0.002 nats an answer token on SmolLM2. It
    is the KL at `NEAR`, less what is left there of `kl`, that at the end of the path, which is quadratic.
    """
    near = path.readout.sums(reference, path.logits(batch, NEAR))
    return [max(0.0, low.kl - NEAR**2 * value) for low, value in zip(near, kl, strict=True)]


@dataclass(frozen=True)
class _Walk:
    """Integrals by so many nodes. sums: of all layers, of each sample, in nats."""

    nodes: int
    integrals: dict[str, Tensor]
    sums: list[float]

    def gaps(self, wanted: Sequence[float]) -> list[float]:
        """By how much the sums miss the damage `wanted` of each sample."""
        return [found - value for found, value in zip(self.sums, wanted, strict=True)]

    def missed(self, wanted: Sequence[float]) -> float:
        """The gaps without their signs, of all samples."""
        return fsum(map(abs, self.gaps(wanted)))

    def is_within(self, wanted: Sequence[float], allowed: float) -> bool:
        """True if all samples together are within `allowed`, and each on its own within a few times that."""
        return abs(fsum(self.gaps(wanted))) <= allowed and self.missed(wanted) <= BY_SAMPLE * allowed


def _walk(path: Path, batch: Batch, reference: list[Tensor], nodes: int) -> _Walk:
    integrals = path.integrals(batch, reference, nodes)
    sums = torch.stack(list(integrals.values())).sum(dim=0).tolist() if integrals else [0.0] * batch.size
    return _Walk(nodes, integrals, sums)
