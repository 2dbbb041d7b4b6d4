"""Measuring the units of a layer table that are missing, those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from qprobe.inputs.batch import Batch, cut
from qprobe.measure.attribution import walking
from qprobe.measure.runner import isolated_half, observe, observe_isolated
from qprobe.measure.subject import Subject
from qprobe.measure.weights import weight_rows
from qprobe.options import Progress
from qprobe.records import Sample
from qprobe.runs.needed import ISOLATED, Measures
from qprobe.runs.store import missing_units, write_unit
from qprobe.system.processes import Shard

Groups = list[tuple[Sample, ...]]


@dataclass(frozen=True)
class Work:
    """The samples of a scan, cut into batches.

    calibration: measured for the layer table. isolated: those of them whose isolated KL is measured, see
    `isolated_half`, in batches as full as the others, so that a device sees few shapes. held_out: measured
    for the choice alone, maybe none.
    """

    calibration: Groups
    isolated: Groups
    held_out: Groups
    notes: tuple[str, ...]

    @property
    def batches(self) -> dict[str, Groups]:
        """By what is measured on them, as the specification of a run names it."""
        return {"calibration": self.calibration, "isolated": self.isolated, "held_out": self.held_out}

    @property
    def samples(self) -> int:
        return sum(len(group) for group in (*self.calibration, *self.held_out))


def cut_samples(
    subject: Subject,
    calibration: tuple[Sample, ...],
    held_out: tuple[Sample, ...],
    size: int,
    notes: tuple[str, ...],
) -> Work:
    """The work on these samples, in batches of at most `size`."""
    half = isolated_half(calibration)
    groups = subject.one_shape_groups(calibration)
    isolated = [[sample for sample in group if sample.id in half] for group in groups]
    return Work(cut(groups, size), cut(isolated, size), subject.groups(held_out, size), notes)


@dataclass(frozen=True)
class _Kind:
    """Units that are measured alike. name: of the kind of work, see `MemoryLimit.running`."""

    name: str
    groups: Groups
    stages: tuple[str, ...]
    observe: Callable[[Batch], dict[str, pd.DataFrame]]

    def missing(self, folder: Path, shard: Shard) -> list[int]:
        """The units of this process of which a file is missing in any stage."""
        count = len(self.groups)
        return sorted({u for stage in self.stages for u in shard.own(missing_units(folder, stage, count))})


def _kinds(subject: Subject, work: Work, measures: Measures) -> list[_Kind]:
    together = _Kind("measure", work.calibration, measures.stages, partial(observe, subject, measures))
    isolated = _Kind("isolated", work.isolated, (ISOLATED,), partial(observe_isolated, subject))
    return [together, isolated] if measures.isolated_kl else [together]


def measure_units(
    subject: Subject, work: Work, measures: Measures, folder: Path, progress: Progress, shard: Shard
) -> None:
    """Run the missing ones of this process's units, one batch at a time."""
    if shard.own(missing_units(folder, "weights", 1)):
        with subject.running("weights"):
            write_unit(folder, "weights", 0, weight_rows(subject.dequantized))
    kinds = _kinds(subject, work, measures)
    todo = [(kind, unit) for kind in kinds for unit in kind.missing(folder, shard)]
    total = sum(len(shard.own(range(len(kind.groups)))) for kind in kinds)
    with walking(subject.path):  # opened once, so that weights change their dtype once
        for done, (kind, unit) in enumerate(todo, start=total - len(todo) + 1):
            batch = subject.encode(kind.groups[unit])
            with subject.running(kind.name, batch.elements, like="measure"):
                frames = kind.observe(batch)
            for stage, frame in frames.items():
                write_unit(folder, stage, unit, frame)
            progress("measure", done, total)
