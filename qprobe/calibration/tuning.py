"""Block scales that are tuned on the answers of the whole model, once codes are chosen layer by layer.

Rounding sees one layer at a time. Here all block scales of a model are moved together, a few hundred small
steps down the gradient of the KL to the 16-bit model (Adam, Kingma and Ba 2015, with a rate that falls to 0),
while the codes stay: not a byte more, and the same container. The scales are doubly quantized again as
bitsandbytes does it. Samples that are kept back say when to stop, and whether the result is used at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprobe.calibration.codes import quantization_state
from qprobe.formats.nf4 import Nf4, PackedNf4, StoredNf4
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.hooks import checkpointed_blocks, replaced_forwards
from qprobe.measure.kl import answer_logits, kl_per_sample
from qprobe.measure.outputs import output_rows
from qprobe.measure.subject import Subject
from qprobe.system.wording import counted

RATE = 1e-3  # of the logarithms of the scales; 2e-3 ends alike on SmolLM2, 4e-3 worse
CHECKS = 8  # looks at the samples kept back
KEPT_BACK = 8  # one sample of so many is kept back
FEWEST = 16  # samples; of fewer, those kept back would decide nothing


STEPS = {"small": 200, "large": 32}  # on CUDA; large: above `FLOAT32_UP_TO` parameters


def tune_steps(subject: Subject, asked: int | None) -> int:
    """How many steps to tune: those `asked` for, or what suits the device and the size of the model."""
    if asked is not None or subject.reference.device.type != "cuda":
        return asked or 0
    return STEPS["small" if subject.path.dtype == torch.float32 else "large"]


@dataclass(frozen=True)
class Tuned:
    """What tuning gave. before, after: damage on the samples kept back, nats per answer token (without a
    language head: normalized squared error of the output), both as the weights are read back.

    stored: the weights by layer; those given where `after` is not below `before`. step: of their scales.
    """

    stored: Mapping[str, StoredNf4]
    before: float
    after: float
    step: int

    @property
    def is_better(self) -> bool:
        return self.after < self.before

    @property
    def sentence(self) -> str:
        """What a reader of the run is told."""
        if not self.is_better:
            return "Tuned scales were no better on the samples kept back, so they are not used."
        return (
            f"Scales were tuned for {counted(self.step, 'step')}: on calibration samples kept back from that "
            f"the damage fell from {self.before:.4g} to {self.after:.4g}."
        )


def split_batches(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(for tuning, kept back): every `KEPT_BACK`-th batch is kept back, one at least."""
    kept = list(batches[KEPT_BACK - 1 :: KEPT_BACK]) or list(batches[-1:])
    return [b for b in batches if not any(b is k for k in kept)], kept


def tune(
    subject: Subject,
    stored: Mapping[str, StoredNf4],
    training: Sequence[Batch],
    kept_back: Sequence[Batch],
    steps: int,
    fmt: Nf4,
    done: Callable[[], None] = lambda: None,
) -> Tuned:
    """`stored`, the 4-bit weights of all quantized linears of `subject`, with tuned block scales.

    A step runs one batch of `training`: the 16-bit model, and the 4-bit one forward and backward. `done` is
    called after each. The result is never worse on `kept_back` than `stored` is.
    """
    tuning = _Tuning(subject, stored, fmt)
    with walking(subject.path):
        training = [b.in_dtype(subject.path.dtype) for b in training]
        kept_back = [b.in_dtype(subject.path.dtype) for b in kept_back]
        before = tuning.damage(kept_back)
        step = _descend(tuning, training, kept_back, steps, before, done)
        found = tuning.finished()
        tuning.replace(found)
        after = tuning.damage(kept_back)
    if step and isfinite(after) and after < before:
        return Tuned(found, before, after, step)
    return Tuned(stored, before, before, 0)


def _descend(
    tuning: _Tuning,
    training: Sequence[Batch],
    kept_back: Sequence[Batch],
    steps: int,
    before: float,
    done: Callable[[], None],
) -> int:
    """Run the steps and leave the scales of the best look at `kept_back` in place; that step's number."""
    optimizer = torch.optim.Adam(tuning.logarithms.values(), lr=RATE)
    best, best_step, kept = before, 0, tuning.snapshot()
    order: list[int] = []
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        if not order:
            order = torch.randperm(len(training), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - (step - 1) / steps)
        optimizer.zero_grad(set_to_none=True)
        if not isfinite(tuning.descend(training[order.pop()])):
            break
        optimizer.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            found = tuning.damage(kept_back)
            if found < best:
                best, best_step, kept = found, step, tuning.snapshot()
        done()
    tuning.restore(kept)
    return best_step


@dataclass
class _Tuning:
    """Scales under way: logarithms by layer of what the scales at the start are multiplied by, (blocks,)."""

    subject: Subject
    stored: Mapping[str, StoredNf4]
    fmt: Nf4
    logarithms: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.replace(self.stored)

    def replace(self, stored: Mapping[str, StoredNf4]) -> None:
        """Go on from the scales of `stored`."""
        self.packed = {name: one.packed() for name, one in stored.items()}
        self.logarithms.clear()
        for name, packed in self.packed.items():
            self.logarithms[name] = torch.zeros_like(packed.state.absmax, requires_grad=True)

    def snapshot(self) -> dict[str, Tensor]:
        return {name: one.detach().clone() for name, one in self.logarithms.items()}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, one in kept.items():
                self.logarithms[name].copy_(one)

    def scales(self, name: str) -> Tensor:
        """(blocks,) the scales of the layer `name` now."""
        return self.packed[name].state.absmax * self.logarithms[name].exp()

    def finished(self) -> dict[str, StoredNf4]:
        """The weights with these scales as bitsandbytes stores them."""
        found = {}
        for name, one in self.stored.items():
            scales, state = self.scales(name).detach(), one.state
            found[name] = StoredNf4(one.codes, quantization_state(scales, state.shape, state.dtype, self.fmt))
        return found

    def forward(self, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        dtype = self.subject.path.dtype
        x = x.to(dtype)
        if name not in self.packed:
            return F.linear(x, self.subject.dequantized.own(name).to(dtype), module.bias)
        return _ScaledLinear.apply(x, self.scales(name), self.packed[name], module.bias)

    def descend(self, batch: Batch) -> float:
        """Damage of one batch per answer token; adds to the gradients of the scales unless non-finite."""
        with torch.no_grad(), replaced_forwards(self.subject.quantized_modules, self._reference):
            wanted = _outputs(self.subject, batch)
        # Blocks run again in the backward pass, so that it belongs inside as well.
        keeping = checkpointed_blocks(self.subject.model, self.subject.path.room_bytes)
        with torch.enable_grad(), keeping, replaced_forwards(self.subject.modules, self.forward):
            damage, weight = _damage(self.subject, batch, wanted)
            found = float(damage.detach()) / weight
            if isfinite(found):
                (damage / weight).backward()
        return found

    def damage(self, batches: Sequence[Batch]) -> float:
        """Damage of `batches` together, per answer token."""
        sums = []
        for batch in batches:
            with torch.no_grad(), replaced_forwards(self.subject.quantized_modules, self._reference):
                wanted = _outputs(self.subject, batch)
            with torch.no_grad(), replaced_forwards(self.subject.modules, self.forward):
                damage, weight = _damage(self.subject, batch, wanted)
            sums.append((float(damage), float(weight)))
        return fsum(d for d, _ in sums) / fsum(w for _, w in sums)

    def _reference(self, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.subject.dequantized.own(name).to(x.dtype), module.bias)


def _outputs(subject: Subject, batch: Batch) -> list[Tensor]:
    """Answer logits of each sample; without a language head the rows of its output that are no padding."""
    if subject.has_head:
        return answer_logits(subject.model, batch)
    return [rows.float() for rows in output_rows(subject.model, batch)]


def _damage(subject: Subject, batch: Batch, wanted: list[Tensor]) -> tuple[Tensor, float]:
    """(sum, what it is a sum over): nats and answer tokens, or squared error and energy of the output."""
    got = _outputs(subject, batch)
    if subject.has_head:
        return kl_per_sample(wanted, got).sum(), max(1, batch.answer_tokens)
    errors = [(y - y_hat).square().double().sum() for y, y_hat in zip(wanted, got, strict=True)]
    return torch.stack(errors).sum(), float(sum(y.square().double().sum() for y in wanted))


class _ScaledLinear(torch.autograd.Function):
    """x W-hat^T + b with W-hat = codes x scales, differentiable in x and the scales; keeps no weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, packed: PackedNf4, bias: Tensor | None) -> Tensor:
        """x (..., in_features); scales (blocks,) float32; packed: codes of (out_features, in_features)."""
        ctx.save_for_backward(x, scales)
        ctx.packed = packed
        return F.linear(x, packed.scaled(scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scales = ctx.saved_tensors
        towards_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        codes = ctx.packed.scaled(torch.ones_like(scales), x.dtype)
        flat = (towards_weight * codes).float().reshape(-1)
        size = ctx.packed.state.blocksize
        by_block = F.pad(flat, (0, -len(flat) % size)).view(-1, size).sum(dim=1)
        towards_x = grad @ ctx.packed.scaled(scales, x.dtype) if ctx.needs_input_grad[0] else None
        return towards_x, by_block, None, None
