"""Checking a run: some of its units are measured again, and compared with those that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import pyarrow as pa
import torch

from qprobe.calibration.calibrate import put_in_place
from qprobe.errors import QprobeError, RunError
from qprobe.loading.device import pick_device
from qprobe.loading.spread import device_of
from qprobe.measure.subject import Subject
from qprobe.runs.folder import ANSWERS, RunFolder
from qprobe.runs.key import Key, differences
from qprobe.runs.units import largest_difference, moved_peaks
from qprobe.scanning.answers import MAX_ANSWERS_BYTES
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.check import check_model
from qprobe.scanning.measure import measure_units
from qprobe.scanning.opening import open_model, open_units
from qprobe.scanning.planning.limit import within_memory
from qprobe.scanning.process import Process
from qprobe.scanning.run import ScanResult, result_of
from qprobe.scanning.samples import prepare_samples, read_samples
from qprobe.scanning.weights import measure_files, open_weights
from qprobe.system.files import make_folder, write_atomic
from qprobe.system.foreign import read_foreign
from qprobe.system.processes import Shard
from qprobe.system.wording import counted, is_or_are, named

UNITS = 3
"""So many units of each kind, or a few more, are measured again: the first, and others at equal distances."""

TIMES, LEAST = 10, 2.0**-20
"""On a GPU a unit may differ from the recorded one by so many times what two runs differ now, or by so much
of a column's largest value, which is eight units in the last place of float32."""


def repeat_units(asked: ScanRequest, process: Process) -> ScanResult:
    """The result of the finished run in the folder of `process`, with what its check found as its verdict.

    A few of its units are measured again, with its own answers and calibrated weights; nothing in its folder
    changes. On a CPU they must be equal to the bit. Raises RunError where they are not, and where `asked` is
    not what the run was asked; what a scan raises.
    """
    run = process.run
    if not process.shard.is_alone:
        raise QprobeError("--check is the work of one process. Unset RANK and WORLD_SIZE.")
    recorded, _ = run.key, run.unit_files() or _nothing(run)
    with TemporaryDirectory(prefix="qprobe-check-") as place:
        again = replace(process, run=RunFolder(Path(place) / "run"))
        steps = _of_weights if asked.measures.is_weight_alone else _of_model
        with steps(replace(asked, folder=again.run.path), run, again) as (device, measure):
            _check_same(run, recorded, again.run.key)
            measure(_part(again, recorded))
            names = [name for name in again.run.unit_files() if name in run.unit_files()] or _nothing(run)
            first = {name: again.run.unit(name) for name in names}
            if device.type == "cpu":
                verdict = _equal(run, first)
            else:
                for name in names:
                    again.run.set_aside(name, f"{name}.first")
                measure(_part(again, recorded))
                verdict = _near(run, first, {name: again.run.unit(name) for name in names}, device)
    return replace(result_of(run), verdict=verdict)


Measure = Callable[[Process], None]


@contextmanager
def _of_model(asked: ScanRequest, run: RunFolder, again: Process) -> Iterator[tuple[torch.device, Measure]]:
    """(the device, what measures a process's share of the units) of a scan that loads the model."""
    skeleton = check_model(asked, again)
    chosen = read_samples(skeleton, asked, again)
    subject = open_model(skeleton, within_memory(skeleton, asked, chosen, again), again, chosen.processed)
    with subject.streaming():
        _copy_answers(run, again.run)
        work = prepare_samples(subject, chosen, asked, again)
        measures = open_units(subject, work, asked, again.run)
        _take_codes(subject, run)
        yield subject.reference.device, lambda process: measure_units(subject, work, measures, process)


@contextmanager
def _of_weights(asked: ScanRequest, run: RunFolder, again: Process) -> Iterator[tuple[torch.device, Measure]]:
    """The same of a scan of the weights alone."""
    device = pick_device(device_of(again.shard, asked.device))
    checkpoint, key = open_weights(asked, again, device)
    again.run.open(key)
    yield device, lambda process: measure_files(checkpoint, device, process)


def _part(again: Process, recorded: Key) -> Process:
    """The process whose share of the units is measured again."""
    most = max(recorded.spec.needed_units.values(), default=1)
    return replace(again, shard=Shard(0, max(1, most // UNITS)))


def _copy_answers(run: RunFolder, again: RunFolder) -> None:
    """The answers that the run was measured with; those that do not fit are not found by their name."""
    if not (run.path / ANSWERS).is_dir():
        return
    make_folder(again.path / ANSWERS)
    for path in sorted((run.path / ANSWERS).glob("*.json")):
        data = read_foreign(path, RunError, "Remove it; answers are made again.", MAX_ANSWERS_BYTES)
        write_atomic(again.path / ANSWERS / path.name, data)


def _take_codes(subject: Subject, run: RunFolder) -> None:
    if not run.key.format.is_calibrated:
        return
    if run.codes is None:
        raise RunError(f"{run.path} has no calibrated weights yet. Let its scan finish first.")
    put_in_place(subject, run.codes, run.path)


def _check_same(run: RunFolder, recorded: Key, now: Key) -> None:
    found = differences(recorded, now)
    if found:
        raise RunError(
            f"{run.path} was measured otherwise: this command differs from it in {found}. Pass the options "
            "of its scan, with the same model, samples and versions."
        )


def _nothing(run: RunFolder) -> NoReturn:
    raise RunError(
        f"{run.path} holds no finished unit that a check measures again, so there is nothing to check. Let "
        "its scan go on."
    )


def _equal(run: RunFolder, again: dict[str, pa.Table]) -> str:
    """What is said of units that are equal to the bit; raises RunError where one is not."""
    other = [name for name, table in again.items() if not table.equals(run.unit(name))]
    if other:
        _refuse(run, other, len(again), "to the bit")
    return f"{_counted(run, again)} on this CPU: all are equal to the bit."


@dataclass(frozen=True)
class _Differing:
    """A unit: how far it is from the recorded one, and two of now from each other: `largest_difference`."""

    name: str
    recorded: float
    now: float

    @property
    def is_near(self) -> bool:
        return self.recorded <= max(TIMES * self.now, LEAST)


def _near(
    run: RunFolder, first: dict[str, pa.Table], second: dict[str, pa.Table], device: torch.device
) -> str:
    """What is said of units as near to the recorded ones as two of now are; raises RunError otherwise."""
    found = [
        _Differing(name, largest_difference(run.unit(name), table), largest_difference(second[name], table))
        for name, table in first.items()
    ]
    most, now = max(x.recorded for x in found), max(x.now for x in found)
    told = f"by up to {most:.2g} of a column's largest value, two runs now by up to {now:.2g}"
    other = [x.name for x in found if not x.is_near]
    if other:
        _refuse(run, other, len(found), f"({told}; {TIMES} times as much, or {LEAST:.1g}, is allowed)")
    moved = sum(moved_peaks(run.unit(name), table) for name, table in first.items())
    peaks = f" {counted(moved, 'peak')} {is_or_are(moved)} at a token of another kind." if moved else ""
    return f"{_counted(run, first)} on {device.type}: they differ {told}.{peaks}"


def _counted(run: RunFolder, again: dict[str, pa.Table]) -> str:
    return f"{len(again)} of {counted(len(run.unit_files()), 'unit')} of {run.path} were measured again"


def _refuse(run: RunFolder, other: list[str], count: int, how: str) -> None:
    raise RunError(
        f"{len(other)} of {counted(count, 'unit')} of {run.path}, measured again, are not the recorded ones "
        f"{how}: {named(other)}. Its numbers are of another machine, or were changed; scan again with "
        "another --out."
    )
