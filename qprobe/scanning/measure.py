"""Measuring the units of a layer table that are missing, those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd

from qprobe.calibration import calibrate as calibration
from qprobe.errors import RunError
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.runner import observe, observe_isolated
from qprobe.measure.subject import Subject
from qprobe.measure.weights import weight_rows
from qprobe.registry.measures import ISOLATED, WEIGHTS
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import Measures
from qprobe.runs.notes import Remarks
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

    def missing(self, run: RunFolder, shard: Shard) -> list[int]:
        """The units of this process of which a file is missing in any stage."""
        count = len(self.groups)
        return sorted({u for stage in self.stages for u in shard.own(run.missing_units(stage, count))})


def _kinds(subject: Subject, work: Work, measures: Measures) -> list[_Kind]:
    together = _Kind("measure", work.calibration, measures.stages, partial(observe, subject, measures))
    isolated = _Kind("isolated", work.isolated, (ISOLATED.name,), partial(observe_isolated, subject))
    return [together, isolated] if measures.isolated_kl else [together]


def measure_units(subject: Subject, work: Work, measures: Measures, process: Process) -> None:
    """Run the missing ones of this process's units, one batch at a time."""
    run, shard, progress = process.run, process.shard, process.progress
    if shard.own(run.missing_units(WEIGHTS.name, 1)):
        with subject.running("weights"):
            run.write_unit(WEIGHTS.name, 0, weight_rows(subject.dequantized))
    kinds = _kinds(subject, work, measures)
    todo = [(kind, unit) for kind in kinds for unit in kind.missing(run, shard)]
    total = sum(len(shard.own(range(len(kind.groups)))) for kind in kinds)
    with walking(subject.path):  # opened once, so that weights change their dtype once
        for done, (kind, unit) in enumerate(todo, start=total - len(todo) + 1):
            batch = subject.encode(kind.groups[unit])
            with subject.running(kind.name, batch.elements, like="measure"):
                frames = kind.observe(batch)
            for stage, frame in frames.items():
                run.write_unit(stage, unit, frame)
            progress("measure", done, total)


def calibrate(subject: Subject, work: Work, tune: int, process: Process) -> None:
    """Choose the codes of every 4-bit weight on the calibration samples, before its damage is measured.

    tune: steps of tuning the scales afterwards.
    Raises RunError where several processes share a scan that is not calibrated yet.
    """
    run = process.run
    if not process.shard.is_alone and run.codes is None:
        raise RunError(
            f"{run.path} is not calibrated yet, and one process calibrates all weights: run the command "
            "without RANK and WORLD_SIZE, or share a scan of plain nf4."
        )
    given = calibration.Work(subject, run, work.calibration, tune_steps=tune, progress=process.progress)
    calibration.calibrate_model(given)
    told = (calibration.FITTED, *calibration.calibration_notes(run))
    run.notes.put("calibration", Remarks(told))
