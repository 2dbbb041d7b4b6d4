"""Damage of a model whose linears compute something else: what decisions on kept-back samples compare.

As the scan measures it; of an output of no known kind the squared error over its energy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import fsum

import torch
from torch import Tensor

from qprobe.inputs.batch import Batch
from qprobe.measure.experts.routing import Product, times
from qprobe.measure.hooks import LayerForward, replaced_forwards
from qprobe.measure.kl import read_out
from qprobe.measure.outputs import output_rows
from qprobe.measure.subject import Subject
from qprobe.records import Sample
from qprobe.runs.key import DAMAGE

KEPT_BACK = 8  # one sample of so many is kept back
FEWEST = 16  # samples; of fewer, those kept back would decide nothing


def split_samples(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(for fitting, kept back): every `KEPT_BACK`-th of `samples`; none of fewer than `FEWEST`."""
    if len(samples) < FEWEST:
        return list(samples), []
    kept = set(range(KEPT_BACK - 1, len(samples), KEPT_BACK))
    return [s for i, s in enumerate(samples) if i not in kept], [samples[i] for i in sorted(kept)]


def unit_of(subject: Subject) -> str:
    """What damage is counted in, in words."""
    return "of the output's squares" if subject.readout is None else DAMAGE[subject.readout.name].unit


def outputs(subject: Subject, batch: Batch) -> list[Tensor]:
    """The rows of each sample that the scan reads; of an output of no known kind all that is no padding."""
    if subject.readout is not None:
        return read_out(subject.model, batch)
    return [rows.float() for rows in output_rows(subject.model, batch)]


def reference_outputs(subject: Subject, batch: Batch) -> list[Tensor]:
    """`outputs` of the 16-bit model."""

    def reference(name: str, product: Product, x: Tensor) -> Tensor:
        return times(product, x, subject.dequantized.own(name).to(x.dtype))

    with torch.no_grad(), replaced_forwards(subject.quantized_modules, reference):
        return outputs(subject, batch)


@dataclass
class References:
    """`reference_outputs` of batches that come again; kept as long as there is room for them.

    room_bytes: for outputs that are kept; the others are computed each time.
    """

    subject: Subject
    room_bytes: int
    _kept: dict[int, tuple[Batch, list[Tensor]]] = field(default_factory=dict)  # by id, which the batch holds

    def of(self, batch: Batch) -> list[Tensor]:
        if id(batch) in self._kept:
            return self._kept[id(batch)][1]
        found = reference_outputs(self.subject, batch)
        size = sum(rows.nbytes for rows in found)
        if size <= self.room_bytes:
            self.room_bytes -= size
            # Copies: in float32 answers are views, which would hold the logits of all positions.
            self._kept[id(batch)] = batch, [rows.clone() for rows in found]
        return found


def damage_of(subject: Subject, batch: Batch, wanted: list[Tensor]) -> tuple[Tensor, float]:
    """(sum, what it is a sum over) of the damage of the model as it is; differentiable."""
    got = outputs(subject, batch)
    if subject.readout is not None:
        return subject.readout.damage(wanted, got).sum(), max(1, sum(subject.readout.counts(batch)))
    errors = [(y - y_hat).square().double().sum() for y, y_hat in zip(wanted, got, strict=True)]
    return torch.stack(errors).sum(), float(sum(y.square().double().sum() for y in wanted))


def mean_damage(
    subject: Subject,
    batches: Iterable[Batch],
    forward: LayerForward,
    reference: Callable[[Batch], list[Tensor]] | None = None,
) -> float:
    """Damage over all `batches` with `forward` in place of every linear; open `walking` around it.

    reference: gives `reference_outputs`, if they are known.
    """
    sums = []
    for batch in batches:
        wanted = reference_outputs(subject, batch) if reference is None else reference(batch)
        with torch.no_grad(), replaced_forwards(subject.modules, forward):
            damage, weight = damage_of(subject, batch, wanted)
        sums.append((float(damage), float(weight)))
    return fsum(d for d, _ in sums) / fsum(w for _, w in sums)
