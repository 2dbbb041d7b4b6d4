"""Measuring the units of a layer table that are missing, those of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from qprobe.calibration.calibrate import calibrate_model, calibration_notes
from qprobe.calibration.correction import keep_correction
from qprobe.calibration.settings import fitted
from qprobe.calibration.tuning import tune_steps
from qprobe.calibration.work import Work
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject
from qprobe.records import Sample
from qprobe.registry.implementation import imported
from qprobe.registry.measures import ACTIVATION, Measure, Unit
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import Measures
from qprobe.runs.notes import Remarks
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.drawn import drawn_texts
from qprobe.scanning.process import Process
from qprobe.scanning.samples import Groups, ScanSamples
from qprobe.system.processes import Shard


@dataclass(frozen=True)
class _Kind:
    """Units that one implementation measures.

    name, like: of the kind of work, see `MemoryLimit.running`.
    """

    name: str
    like: str
    groups: Groups
    stages: frozenset[str]
    observe: Callable[[Batch], dict[str, pd.DataFrame]]

    def missing(self, run: RunFolder, shard: Shard) -> list[int]:
        """The units of this process of which a file is missing in any stage."""
        return _missing(run, shard, self.stages, len(self.groups))


def _missing(run: RunFolder, shard: Shard, stages: frozenset[str], count: int) -> list[int]:
    return sorted({unit for stage in stages for unit in shard.own(run.missing_units(stage, count))})


def _together(measures: Measures, units: Iterable[Unit]) -> dict[str, list[Measure]]:
    """What is measured in `units`, by implementation, in the order of declaration."""
    found: dict[str, list[Measure]] = {}
    for measure in measures.taken:
        if measure.unit in units:
            found.setdefault(measure.implementation, []).append(measure)
    return found


def _stages(together: Iterable[Measure]) -> frozenset[str]:
    return frozenset(stage.name for x in together for stage in x.stages)


def _kinds(subject: Subject, work: ScanSamples, measures: Measures) -> list[_Kind]:
    """The kinds of units that run samples."""
    groups: dict[Unit, Groups] = {"batch": work.calibration, "half batch": work.isolated}
    names: dict[str, str] = {}  # of the kind in which a measure is taken
    kinds = []
    for path, together in _together(measures, groups).items():
        first = together[0]
        name = "measure" if first.name == ACTIVATION.name else first.name
        names |= {x.name: name for x in together}
        observe = partial(imported(path), subject, measures)
        like = names.get(first.follows or "", "")
        kinds.append(_Kind(name, like, groups[first.unit], _stages(together), observe))
    return kinds


def measure_units(subject: Subject, work: ScanSamples, measures: Measures, process: Process) -> None:
    """Run the missing ones of this process's units, one batch at a time."""
    run, shard, progress = process.run, process.shard, process.progress
    for path, together in _together(measures, ["weights"]).items():
        if _missing(run, shard, _stages(together), 1):
            with subject.running("weights"):
                _write(run, _stages(together), 0, imported(path)(subject))
    kinds = _kinds(subject, work, measures)
    todo = [(kind, unit) for kind in kinds for unit in kind.missing(run, shard)]
    total = sum(len(shard.own(range(len(kind.groups)))) for kind in kinds)
    with walking(subject.path):  # opened once, so that weights change their dtype once
        for done, (kind, unit) in enumerate(todo, start=total - len(todo) + 1):
            frames = subject.measured(kind.name, kind.groups[unit], kind.observe, kind.like)
            _write(run, kind.stages, unit, frames)
            progress("measure", done, total)


def _write(run: RunFolder, stages: frozenset[str], unit: int, frames: Mapping[str, pd.DataFrame]) -> None:
    assert frames.keys() == stages, sorted(frames.keys() ^ stages)
    for stage, frame in frames.items():
        run.write_unit(stage, unit, frame)


def calibrate(subject: Subject, work: ScanSamples, asked: ScanRequest, process: Process) -> None:
    """Choose the codes of every 4-bit weight on the calibration samples, before its damage is measured.

    Processes that share a scan share this as well, each of which waits for the others.
    """
    run, tune = process.run, tune_steps(subject, asked.tune)
    draw = partial(drawn_texts, subject, asked.drawn_texts, asked.samples.seed, process)

    def calibrated(groups: Sequence[Sequence[Sample]]) -> Work:
        samples = [tuple(group) for group in groups]
        given = Work(subject, run, samples, tune_steps=tune, progress=process.progress, draw=draw)
        calibrate_model(given, process.shard)
        return given

    given = subject.halving.run_all("calibration", [*work.calibration, *work.codes], calibrated)
    if asked.keep_correction is not None and process.shard.rank == 0:
        keep_correction(given, asked.keep_correction)
    count = asked.calibration_samples
    about = fitted(work.calibration, work.codes, work.held_out, count, asked.drawn_texts)
    told = (about, *calibration_notes(run))
    run.notes.put("calibration", Remarks(told))
