"""Block scales that are tuned on the answers of the whole model, once codes are chosen layer by layer.

Rounding sees one layer at a time. Here all block scales of a model are moved together, a few hundred small
steps down the gradient of the KL to the 16-bit model (Adam, Kingma and Ba 2015, with a rate that falls to 0),
while the codes stay: not a byte more, and the same container. The scales are doubly quantized again as
bitsandbytes does it. Samples that are kept back say when to stop, and whether the result is used at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from math import inf, isfinite

import torch
from torch import Tensor

from qprobe.calibration.codes import packed_codes, quantization_state, unpacked_codes
from qprobe.calibration.damage import References, damage_of, mean_damage, unit_of
from qprobe.calibration.tuned_linear import Tunable, TunedLinear, nearest_codes, units_of
from qprobe.formats.nf4 import Nf4, StoredNf4
from qprobe.inputs.batch import PAD, Batch
from qprobe.measure.attribution import walking
from qprobe.measure.experts.routing import Product, times
from qprobe.measure.hooks import checkpointed_blocks, replaced_forwards
from qprobe.measure.memory import free_memory
from qprobe.measure.subject import Subject
from qprobe.records import Sample
from qprobe.system.wording import counted

RATE = 1e-3  # of the logarithms of the scales; 2e-3 ends alike on SmolLM2, 4e-3 worse
EPSILON = 1e-12  # of Adam: gradients of a small KL are themselves below its usual 1e-8
CODES_FROM = 1.0  # share of the steps after which codes move as well; 1 leaves them, until it is known to pay
UNIT_RATE = 2e-3  # of the units of codes
CODE_BYTES = 26  # its unit, gradient and two averages in float32, and what a step takes of them on the way
SLACK = 0.4  # of a unit: how near a boundary a code begins that is not the nearest one to its weight
CHECKS = 8  # looks at the samples kept back
REFERENCE_BYTES = 2**30  # of the 16-bit model's answers, which every epoch needs again, at most
REFERENCE_SHARE = 8  # one part in so many of the memory that is free: a step needs the others
# Kinds of work for a memory limit: from the second step on the optimizer's averages and gradients are held.
_BEFORE, _FIRST, _STEP, _LOOK = "look before tuning", "first step", "tune", "look at scales"


STEPS = {"small": 200, "large": 32}  # on CUDA; large: above `FLOAT32_UP_TO` parameters
LARGE_AT_ONCE = 2  # samples in a step of a large model, whose activations and gradients decide its peak


def tune_steps(subject: Subject, asked: int | None) -> int:
    """How many steps to tune: those `asked` for, or what suits the device and the size of the model."""
    return default_steps(subject.reference.device, subject.path.dtype) if asked is None else asked


def default_steps(device: torch.device, dtype: torch.dtype) -> int:
    """How many steps suit the device, and a model whose path is walked in `dtype`."""
    if device.type != "cuda":
        return 0
    return STEPS["small" if dtype == torch.float32 else "large"]


def tuned_together(subject: Subject, groups: Sequence[tuple[Sample, ...]]) -> list[tuple[Sample, ...]]:
    """The samples of `groups` in those that a step runs together: smaller ones for a large model."""
    if subject.path.dtype == torch.float32:
        return list(groups)
    return subject.groups(tuple(chain.from_iterable(groups)), LARGE_AT_ONCE)


def can_move_codes(subject: Subject) -> bool:
    """True if the model is small, and there is room for gradients of all codes, `CODE_BYTES` for each."""
    if subject.limit is not None or subject.path.dtype != torch.float32:
        return False
    codes = sum(module.weight.numel() for module in subject.quantized_modules.values())
    return CODE_BYTES * codes < min(free_memory(device) for device in subject.reference.devices)


@dataclass(frozen=True)
class Schedule:
    """How many steps, and the first in which codes move as well."""

    steps: int
    codes_from: int


@dataclass(frozen=True)
class Tuned:
    """What tuning gave. before, after: damage on the samples kept back, both as the weights are read back.

    stored: the weights by layer; those given where `after` is not below `before`. step: of their scales.
    tried: that of the best tuned scales, used or not; inf where there were none. unit: of damage, in words.
    """

    stored: Mapping[str, StoredNf4]
    before: float
    after: float
    step: int
    tried: float
    unit: str

    @property
    def is_better(self) -> bool:
        return self.after < self.before

    @property
    def sentence(self) -> str:
        """What a reader of the run is told."""
        if not self.is_better:
            if not isfinite(self.tried):
                return "Tuning scales came to no finite damage, so it is left out."
            return (
                f"Tuned scales were no better on the calibration samples kept back ({self.tried:.4g} "
                f"{self.unit} at best, {self.before:.4g} before), so they are not used."
            )
        return (
            f"Scales were tuned for {counted(self.step, 'step')}: on calibration samples kept back from that "
            f"the damage fell from {self.before:.4g} to {self.after:.4g} {self.unit}."
        )


@dataclass(frozen=True)
class Given:
    """What scales are tuned on. kept_back: to stop by. drawn: texts of the model's own, see `Work.drawn`."""

    training: Sequence[Batch]
    kept_back: Sequence[Batch]
    drawn: Sequence[Batch] = ()

    def in_dtype(self, dtype: torch.dtype) -> Given:
        """The same with floating inputs in `dtype`."""
        training, kept_back, drawn = (
            [b.in_dtype(dtype) for b in x] for x in (self.training, self.kept_back, self.drawn)
        )
        return Given(training, kept_back, drawn)

    @property
    def share(self) -> float:
        """Steps on drawn texts for each on samples: one, or fewer where they are fewer tokens."""
        samples, texts = (sum(int((b.kinds != PAD).sum()) for b in x) for x in (self.training, self.drawn))
        return min(1.0, texts / samples)

    def in_turn(self) -> Iterator[Batch]:
        """A batch for each step, without end: samples, and among them batches of drawn texts."""
        generator = torch.Generator().manual_seed(0)
        samples, texts = (_shuffled(x, generator) for x in (self.training, self.drawn))
        share = self.share
        for step in count(1):
            yield next(samples)
            if int(share * step) > int(share * (step - 1)):
                yield next(texts)


def _shuffled(batches: Sequence[Batch], generator: torch.Generator) -> Iterator[Batch]:
    """`batches` again and again, in another order each time."""
    while True:
        order = torch.randperm(len(batches), generator=generator).tolist()
        yield from (batches[i] for i in reversed(order))


def tune(
    subject: Subject,
    stored: Mapping[str, StoredNf4],
    given: Given,
    steps: int,
    fmt: Nf4,
    done: Callable[[], None] = lambda: None,
    codes_from: float = CODES_FROM,
) -> Tuned:
    """`stored`, the 4-bit weights of all quantized linears of `subject`, with tuned block scales.

    codes_from: the share of the steps after which codes are moved as well, from where the weights lie between
    them, where there is room for that (see `can_move_codes`).

    A step runs one batch that is not kept back: the 16-bit model, and the 4-bit one forward and backward.
    `done` is called after each. The result is never worse on what is kept back than `stored` is.
    Raises MachineError if a memory limit has no room for that.
    """
    with walking(subject.path):
        tuning = _Tuning(subject, stored, fmt)
        given = given.in_dtype(subject.path.dtype)
        before = tuning.damage(given.kept_back, _BEFORE)
        first = 1 + round((codes_from if can_move_codes(subject) else 1.0) * steps)
        step, lowest = _descend(tuning, given, Schedule(steps, first), before, done)
        found = tuning.finished()
        tuning.replace(found)
        after = tuning.damage(given.kept_back)
    if step and isfinite(after) and after < before:
        return Tuned(found, before, after, step, lowest, unit_of(subject))
    return Tuned(stored, before, before, 0, after if step else lowest, unit_of(subject))


def _descend(
    tuning: _Tuning,
    given: Given,
    schedule: Schedule,
    before: float,
    done: Callable[[], None],
) -> tuple[int, float]:
    """Run the steps, and leave the scales of the best look at what is kept back.

    (that step's number, 0 if none is below `before`; the least damage at any look)
    """
    optimizer = torch.optim.Adam(tuning.logarithms.values(), lr=RATE, eps=EPSILON)
    steps = schedule.steps
    best, best_step, lowest, kept = before, 0, inf, tuning.snapshot()
    batches = given.in_turn()
    for step in range(1, steps + 1):
        if step == schedule.codes_from:
            tuning.free_codes()
            optimizer.add_param_group({"params": tuning.units.values(), "lr": UNIT_RATE})
        for group, rate in zip(optimizer.param_groups, (RATE, UNIT_RATE), strict=False):
            group["lr"] = rate * (1 - (step - 1) / steps)
        optimizer.zero_grad(set_to_none=True)
        batch = next(batches)
        with tuning.subject.running(_FIRST if step == 1 else _STEP, batch.elements):
            is_finite = isfinite(tuning.descend(batch))
            if is_finite:
                optimizer.step()
        if not is_finite:
            break
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            found = tuning.damage(given.kept_back)
            lowest = min(lowest, found)
            if found < best:
                best, best_step, kept = found, step, tuning.snapshot()
        done()
    tuning.restore(kept)
    return best_step, lowest


@dataclass
class _Tuning:
    """Scales and codes under way.

    logarithms: by layer, of what the scales at the start are multiplied by, (blocks,). units: of the codes,
    (n,), see `qprobe.calibration.tuned_linear`; none where they stay.
    """

    subject: Subject
    stored: Mapping[str, StoredNf4]
    fmt: Nf4
    logarithms: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.references = References(self.subject, _reference_room(self.subject))
        self.replace(self.stored)

    def replace(self, stored: Mapping[str, StoredNf4]) -> None:
        """Go on from `stored`; codes stay until `free_codes`."""
        self.packed = {name: one.packed() for name, one in stored.items()}
        self.logarithms.clear()
        self.units.clear()
        for name, packed in self.packed.items():
            self.logarithms[name] = torch.zeros_like(packed.state.absmax, requires_grad=True)

    def free_codes(self) -> None:
        """Let codes move from here on."""
        for name, packed in self.packed.items():
            one = Tunable(packed)
            weight = self.subject.dequantized.own(name).reshape(-1)
            codes = unpacked_codes(packed.codes, one.count)
            self.units[name] = units_of(weight, codes, one.spread(self.scales(name).detach()), SLACK)
            self.units[name].requires_grad_()

    def snapshot(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """What `restore` takes: of each layer the logarithms, and the codes where they move."""
        return {
            name: (one.detach().clone(), _codes(self.units.get(name)))
            for name, one in self.logarithms.items()
        }

    def restore(self, kept: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        """Go back to a snapshot; codes that moved are at the middle of their units then."""
        with torch.no_grad():
            for name, (logarithms, codes) in kept.items():
                self.logarithms[name].copy_(logarithms)
                if codes is not None:
                    self.units[name].copy_(codes)
                elif name in self.units:  # of before they moved
                    own = self.packed[name]
                    self.units[name].copy_(unpacked_codes(own.codes, Tunable(own).count))

    def scales(self, name: str) -> Tensor:
        """(blocks,) the scales of the layer `name` now."""
        return self.packed[name].state.absmax * self.logarithms[name].exp()

    def finished(self) -> dict[str, StoredNf4]:
        """The weights with these scales and codes as bitsandbytes stores them."""
        found = {}
        for name, one in self.stored.items():
            scales, state = self.scales(name).detach(), one.state
            codes = _codes(self.units.get(name))
            packed = one.codes if codes is None else packed_codes(codes.view(state.shape))
            found[name] = StoredNf4(packed, quantization_state(scales, state.shape, state.dtype, self.fmt))
        return found

    def forward(self, name: str, product: Product, x: Tensor) -> Tensor:
        dtype = self.subject.path.dtype
        x = x.to(dtype)
        if name not in self.packed:
            trips = self.subject.dequantized
            is_expert = self.subject.layers[name].experts and name in self.subject.quantized
            return times(product, x, (trips.weight if is_expert else trips.own)(name).to(dtype))
        units = self.units.get(name)
        return TunedLinear.apply(x, self.scales(name), units, self.packed[name], product.bias)

    def descend(self, batch: Batch) -> float:
        """Damage of one batch per answer token; adds to the gradients of the scales unless non-finite."""
        wanted = self.references.of(batch)
        # Blocks run again in the backward pass, so that it belongs inside as well.
        keeping = checkpointed_blocks(self.subject.model, self.subject.path.room_bytes)
        with torch.enable_grad(), keeping, replaced_forwards(self.subject.modules, self.forward):
            damage, weight = damage_of(self.subject, batch, wanted)
            found = float(damage.detach()) / weight
            if isfinite(found):
                (damage / weight).backward()
        return found

    def damage(self, batches: Sequence[Batch], kind: str = _LOOK) -> float:
        """Damage of `batches` together, see `mean_damage`. kind: of work."""
        size = max((batch.elements for batch in batches), default=1)
        with self.subject.running(kind, size, like=_STEP):
            return mean_damage(self.subject, batches, self.forward, self.references.of)


def _reference_room(subject: Subject) -> int:
    """Bytes for answers of the 16-bit model; none of a large model, whose peak is that of a step."""
    if subject.path.dtype != torch.float32 or subject.limit is not None:
        return 0
    free = min(free_memory(device) for device in subject.reference.devices)
    return min(REFERENCE_BYTES, free // REFERENCE_SHARE)


def _codes(units: Tensor | None) -> Tensor | None:
    return None if units is None else nearest_codes(units.detach()).to(torch.uint8)
