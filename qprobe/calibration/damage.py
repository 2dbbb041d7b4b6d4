"""Damage of a model whose linears compute something else: what decisions on kept-back samples compare.

As the scan measures it; of an output of no known kind the squared error over its energy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum
from typing import Any

import torch
from torch import Tensor

from qprobe.inputs.batch import Batch
from qprobe.measure.experts.routing import Product, times
from qprobe.measure.hooks import LayerForward, replaced_forwards
from qprobe.measure.kl import read_out
from qprobe.measure.outputs import output_rows
from qprobe.measure.subject import Subject

KEPT_BACK = 8  # one sample of so many is kept back
FEWEST = 16  # samples; of fewer, those kept back would decide nothing


def can_keep_back(groups: Sequence[Sequence[Any]]) -> bool:
    """True if some of the batches of samples can be kept back, and decide something."""
    return len(groups) > 1 and sum(map(len, groups)) >= FEWEST


def split_batches(batches: Sequence[Any]) -> tuple[list[int], list[int]]:
    """(for fitting, kept back) numbers of `batches`: every `KEPT_BACK`-th is kept back, one at least."""
    numbers = list(range(len(batches)))
    kept = numbers[KEPT_BACK - 1 :: KEPT_BACK] or numbers[-1:]
    return [i for i in numbers if i not in kept], kept


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


def damage_of(subject: Subject, batch: Batch, wanted: list[Tensor]) -> tuple[Tensor, float]:
    """(sum, what it is a sum over) of the damage of the model as it is; differentiable."""
    got = outputs(subject, batch)
    if subject.readout is not None:
        return subject.readout.damage(wanted, got).sum(), max(1, sum(subject.readout.counts(batch)))
    errors = [(y - y_hat).square().double().sum() for y, y_hat in zip(wanted, got, strict=True)]
    return torch.stack(errors).sum(), float(sum(y.square().double().sum() for y in wanted))


def mean_damage(subject: Subject, batches: Iterable[Batch], forward: LayerForward) -> float:
    """Damage over all `batches` with `forward` in place of every linear; open `walking` around it."""
    sums = []
    for batch in batches:
        wanted = reference_outputs(subject, batch)
        with torch.no_grad(), replaced_forwards(subject.modules, forward):
            damage, weight = damage_of(subject, batch, wanted)
        sums.append((float(damage), float(weight)))
    return fsum(d for d, _ in sums) / fsum(w for _, w in sums)
