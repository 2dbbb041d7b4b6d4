"""Measuring the units of a layer table that are missing, those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from qprobe.calibration import calibrate as calibration
from qprobe.errors import RunError
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.runner import observe, observe_isolated
from qprobe.measure.subject import Subject
from qprobe.measure.weights import weight_rows
from qprobe.runs.needed import ISOLATED, Measures
from qprobe.runs.store import missing_units, read_scan, write_unit
from qprobe.scanning.findings import add_notes
from qprobe.scanning.process import Process
from qprobe.scanning.samples import Groups, Work
from qprobe.system.processes import Shard


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


def measure_units(subject: Subject, work: Work, measures: Measures, process: Process) -> None:
    """Run the missing ones of this process's units, one batch at a time."""
    folder, shard, progress = process.folder, process.shard, process.progress
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


def calibrate(subject: Subject, work: Work, process: Process) -> None:
    """Choose the codes of every 4-bit weight on the calibration samples, before its damage is measured.

    Raises RunError where several processes share a scan that is not calibrated yet.
    """
    folder = process.folder
    if not process.shard.is_alone and read_scan(folder).codes is None:
        raise RunError(
            f"{folder} is not calibrated yet, and one process calibrates all weights: run the command "
            "without RANK and WORLD_SIZE, or share a scan of plain nf4."
        )
    calibration.calibrate_model(
        calibration.Work(subject, folder, work.calibration, progress=process.progress)
    )
    add_notes(folder, (calibration.FITTED, *calibration.calibration_notes(folder)))
