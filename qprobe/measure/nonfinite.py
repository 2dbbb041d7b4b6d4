"""Where a 16-bit model stops being finite, asked where samples give no usable answer."""

from __future__ import annotations

import torch
from torch import Tensor

from qprobe.inputs.running import failure_explained
from qprobe.measure.experts.routing import Product, times
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.outputs import run_model
from qprobe.measure.subject import Subject
from qprobe.records import Sample


def first_nonfinite(subject: Subject, samples: tuple[Sample, ...]) -> str | None:
    """The first linear whose output on a batch of `samples` holds NaN or infinity; None if none does.

    One forward pass of the 16-bit model. Raises ModelError where it does not run.
    """
    parts = subject.halving.run("the first pass", samples, lambda part: _in_batch(subject, tuple(part)))
    return next((name for _, name in parts if name is not None), None)


def _in_batch(subject: Subject, samples: tuple[Sample, ...]) -> str | None:
    flags: dict[str, Tensor] = {}

    def forward(name: str, product: Product, x: Tensor) -> Tensor:
        y = times(product, x, subject.dequantized.own(name))
        flags.setdefault(name, torch.isfinite(y).all())  # read once, after the pass
        return y

    batch = subject.encode(samples)
    own_faults = failure_explained(subject.model)
    with own_faults, torch.inference_mode(), replaced_forwards(subject.modules, forward):
        run_model(subject.model, batch)
    return next((name for name, is_finite in flags.items() if not is_finite), None)


def first_finite(subject: Subject, groups: list[tuple[Sample, ...]]) -> tuple[Sample, ...] | None:
    """The first of `groups`, or else the first sample of them, on which every linear's output is finite."""
    singles = [(sample,) for group in groups for sample in group if len(group) > 1]
    return next((s for s in (*groups, *singles) if first_nonfinite(subject, s) is None), None)
