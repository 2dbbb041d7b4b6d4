"""Adapters of one base that train side by side: a lane each, in one forward and one backward pass.

A step of a small model is some thousand kernels, which a GPU runs faster than Python names them, so that
twelve adapters cost little more than one. Nothing flows between lanes: every row of a batch meets the adapter
of its own lane alone, gradients are clipped lane by lane, and AdamW works number by number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprobe.inputs.encoding import IGNORED

Adapter = Mapping[str, tuple[Tensor, Tensor]]
"""By layer ((rank, in_features), (out_features, rank)), float32: what LoRA calls A and B, of scaling 1."""


@dataclass(frozen=True)
class Begun:
    """An adapter at its start. pace: by layer ((rank,), (rank,)), what the learning rate of each row of A and
    each column of B is multiplied by.
    """

    adapter: Adapter
    pace: Adapter


class Lanes:
    """The linears `names` of `model`, each with `count` adapters of `rank` beside it; all else is frozen.

    Rows of a batch lie lane by lane, as many for each. An adapter computes in float32, as peft's does.
    """

    def __init__(self, model: Any, names: Sequence[str], rank: int, count: int) -> None:
        self.model, self.count = model, count
        model.requires_grad_(False)
        self._a: dict[str, nn.Parameter] = {}
        self._b: dict[str, nn.Parameter] = {}
        self._paces: dict[str, tuple[Tensor, ...]] = {}
        for name in names:
            module = model.get_submodule(name)
            out_features, in_features = module.weight.shape
            device = module.weight.device
            self._a[name] = nn.Parameter(torch.zeros(count, rank, in_features, device=device))
            self._b[name] = nn.Parameter(torch.zeros(count, out_features, rank, device=device))
            self._paces[name] = tuple(torch.ones(count, rank, device=device) for _ in range(2))
            module.register_parameter("lane_a", self._a[name])
            module.register_parameter("lane_b", self._b[name])
            module.forward = _Forward(module, count)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self._a.values(), *self._b.values()]

    def set(self, lane: int, adapter: Adapter) -> None:
        """Let the adapter of `lane` be `adapter`."""
        with torch.no_grad():
            for name, (a, b) in adapter.items():
                self._a[name][lane].copy_(a)
                self._b[name][lane].copy_(b)

    def begin(self, lane: int, begun: Begun) -> None:
        """Let `lane` begin at `begun`, and learn at its pace."""
        self.set(lane, begun.adapter)
        for name, paces in begun.pace.items():
            for mine, given in zip(self._paces[name], paces, strict=True):
                mine[lane].copy_(given)

    @property
    def paces(self) -> list[Tensor]:
        """What a step of each of `parameters` is multiplied by, of shapes that broadcast with it."""
        both = self._paces.values()
        return [*(a[:, :, None] for a, _ in both), *(b[:, None, :] for _, b in both)]

    def adapter(self, lane: int) -> Adapter:
        """A copy of the adapter of `lane`."""
        return {
            name: (self._a[name][lane].detach().clone(), self._b[name][lane].detach().clone())
            for name in self._a
        }

    def remove(self) -> None:
        """Leave the model as it was."""
        for name in self._a:
            module = self.model.get_submodule(name)
            del module.lane_a, module.lane_b, module.forward

    def losses(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(lanes,) the mean loss of the answer tokens of each, differentiable."""
        sums, tokens = _by_row(self.model, inputs)
        return sums.view(self.count, -1).sum(1) / tokens.view(self.count, -1).sum(1)

    def line_losses(self, inputs: Mapping[str, Tensor]) -> list[list[float]]:
        """For each lane the mean loss of each line of `inputs`, which are of one lane."""
        with torch.no_grad():
            sums, tokens = _by_row(self.model, _repeated(inputs, self.count))
        return (sums / tokens).view(self.count, -1).tolist()


class _Forward:
    """x W^T + b and, for each lane's rows, x A^T B^T."""

    def __init__(self, module: Any, count: int) -> None:
        self._module, self._count = module, count

    def __call__(self, x: Tensor) -> Tensor:
        module = self._module
        y = F.linear(x, module.weight, module.bias)
        rows = x.reshape(self._count, -1, x.shape[-1]).float()
        added = rows @ module.lane_a.transpose(1, 2) @ module.lane_b.transpose(1, 2)
        return y + added.to(y.dtype).view(y.shape)


def _repeated(inputs: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    return {key: x.repeat(count, *[1] * (x.dim() - 1)) for key, x in inputs.items()}


def _by_row(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """((rows,) the summed loss of each row's answer tokens, (rows,) how many there are)."""
    labels = inputs["labels"][:, 1:]
    logits = model(**{key: x for key, x in inputs.items() if key != "labels"}).logits[:, :-1]
    each = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


def train(
    lanes: Lanes, batches: Iterator[Mapping[str, Tensor]], steps: int, rate: float, warm: int
) -> Iterator[int]:
    """Trains all lanes as `finetune` does, on batches with their rows lane by lane; the number of each step,
    before it is taken, and of the last one.
    """
    optimizer = torch.optim.AdamW(lanes.parameters, lr=rate, weight_decay=0.0)
    for step in range(steps + 1):
        yield step
        if step == steps:
            return
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        optimizer.zero_grad(set_to_none=True)
        lanes.losses(next(batches)).sum().backward()
        # AdamW works number by number: a share of its step is the step of that share of the learning rate.
        for x, pace in zip(lanes.parameters, lanes.paces, strict=True):
            if x.grad is not None:
                x.grad.mul_(pace > 0)
        clip_by_lane([x.grad for x in lanes.parameters if x.grad is not None], 1.0)
        before = [x.detach().clone() for x in lanes.parameters]
        optimizer.step()
        with torch.no_grad():
            for x, old, pace in zip(lanes.parameters, before, lanes.paces, strict=True):
                x.copy_(torch.lerp(old, x, pace))


def clip_by_lane(gradients: Sequence[Tensor], most: float) -> None:
    """Scales the gradients of each lane, the first dimension, to a norm of at most `most`, in place."""
    squares = torch.stack([x.flatten(1).square().sum(1) for x in gradients]).sum(0)
    scale = (most / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for x in gradients:
        x.mul_(scale.view(-1, *[1] * (x.dim() - 1)))


# Where adapters begin -------------------------------------------------------------------------------------


def zero_start(model: Any, names: Iterable[str], rank: int, seed: int) -> Adapter:
    """A as LoRA draws it (peft 0.21: kaiming_uniform with a = sqrt(5)), and B zero."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        out_features, in_features = model.get_submodule(name).weight.shape
        bound = 1 / math.sqrt(in_features)
        a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        found[name] = (a, torch.zeros(out_features, rank))
    return found


def with_products(begun: Adapter, products: Adapter) -> Adapter:
    """`begun` with A and B of `products`, of its rank, where these have the layer."""
    return {name: products.get(name, pair) for name, pair in begun.items()}


def loftq_start(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) as peft's replace_lora_weights_loftq finds them for W - W-hat: its best product of `rank`.

    By eigenvectors of the smaller of R R^T and R^T R in float64, some ten times as fast as peft's
    decomposition.
    """
    wide = residual.double() if residual.shape[0] <= residual.shape[1] else residual.double().T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    u, s = vectors[:, -rank:].flip(1), values[-rank:].flip(0).clamp(min=0).sqrt()
    left, right = u * s.sqrt(), (u.T @ wide) / s.clamp(min=1e-30).sqrt()[:, None]
    if wide.shape != residual.shape:
        left, right = right.T, left.T
    return right.float().contiguous(), left.float().contiguous()
