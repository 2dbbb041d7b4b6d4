"""Joining the run folders of one scan that several machines measured; the model is not needed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qprobe.errors import RunError
from qprobe.formats.codes_file import checked
from qprobe.runs.findings import write_findings
from qprobe.runs.folder import ANSWERS, RunFolder
from qprobe.runs.key import differences
from qprobe.runs.shards import entered
from qprobe.runs.shown import FILE as SHOWN
from qprobe.system.files import atomic_file, make_folder
from qprobe.system.foreign import open_foreign
from qprobe.system.processes import Shard
from qprobe.system.wording import counted

_REMARKS = ("start", "calibration", "tuning", "memory", "damaged")  # topics of the notes that no unit tells


@dataclass(frozen=True)
class Joined:
    """What joining left. units: finished ones of all stages. missing: units that the layer table still needs.

    notes: sentences a reader must see.
    """

    run: Path
    units: int
    missing: int
    notes: tuple[str, ...]


def join(runs: Sequence[str | Path], out: str | Path) -> Joined:
    """The folder `out`, in which the finished units of `runs` are joined, all of one scan, with its tables.

    The folders stay as they are. `out` may be new, or hold units of the same scan already. Neither the order
    of `runs` nor how units were shared among them changes a digit. Where two hold the same unit with other
    numbers (machines round differently), the same one of them is taken in any order, and a note says so.
    Raises RunError if there is nothing to join, a folder is no run or damaged, or keys or calibrated weights
    differ; nothing is copied then.
    """
    if not runs:
        raise RunError("There is nothing to join. Pass the run folders of one scan.")
    if Path(out).exists() and not Path(out).is_dir():
        raise RunError(f"{out} is a file, and the joined run is a folder. Pass another --out.")
    folders: dict[Path, RunFolder] = {}
    *sources, target = (folders.setdefault(Path(x).resolve(), RunFolder(Path(x))) for x in (*runs, out))
    _check_keys(sources)
    _check_codes(sources)  # before a folder is made
    with entered(target.path, Shard()):
        _check_codes([*sources, *([target] if target.is_there else [])])
        target.open(sources[0].key)
        _join_notes(sources, target)
        _join_codes(sources, target)  # first: units without the codes that they are of would be refused later
        twice = _join_units(list(folders.values()), target)
        _join_answers(sources, target)
        missing = target.units_left
        if not missing:
            write_findings(target)
    notes = (
        f"{counted(len(twice), 'unit')} with other numbers in several folders, as other machines round them; "
        f"one of each was taken: {', '.join(twice[:3])}{', ...' if len(twice) > 3 else ''}.",
    )
    return Joined(target.path, len(target.unit_files()), missing, notes if twice else ())


def _check_keys(runs: Sequence[RunFolder]) -> None:
    """Raises RunError unless all `runs` are of one scan."""
    for run in runs[1:]:
        found = differences(runs[0].key, run.key)
        if found:
            raise RunError(
                f"{runs[0].path} and {run.path} are different scans: {found}. Join only runs of the same "
                "command with the same model, samples and versions."
            )


def _join_notes(runs: Sequence[RunFolder], target: RunFolder) -> None:
    """Note in `target` what no unit tells: remarks, and in scans of weights alone what is not stored."""
    for topic in _REMARKS:
        noted = [run.notes.get(topic) for run in runs]
        target.notes.add(topic, [said for one in noted if one for said in one.notes])
    known = runs[0].notes.get("layers")
    if known is not None and target.key.spec.files:
        target.notes.put("layers", known)


def _join_units(sources: Sequence[RunFolder], target: RunFolder) -> list[str]:
    """Put every unit of `sources` into `target`; the names of those that differ between them."""
    found: dict[str, dict[str, tuple[RunFolder, bytes]]] = {}
    for run in sources:
        for name in run.unit_files():
            data = run.load_unit(name)
            found.setdefault(name, {}).setdefault(hashlib.sha256(data).hexdigest(), (run, data))
    for name, versions in sorted(found.items()):
        run, data = versions[min(versions)]
        if run is not target:
            target.put_unit(name, data, run.unit(name))
    return sorted(name.removesuffix(".parquet") for name, versions in found.items() if len(versions) > 1)


def _join_answers(runs: Sequence[RunFolder], target: RunFolder) -> None:
    """Put the answers and what reports show of the samples into `target`; they are equal in all runs."""
    for run in runs:
        for path in sorted((run.path / ANSWERS).glob("*.json")):
            there = target.path / path.relative_to(run.path)
            if not there.exists():
                _copy(path, there)
        if not target.files.is_whole(SHOWN) and run.files.has(SHOWN):
            target.files.write({SHOWN: (run.files.read(SHOWN) or b"", len(run.samples))})


def _check_codes(runs: Sequence[RunFolder]) -> None:
    """Raises RunError unless all measurements of `runs` are of the same calibrated weights, if of any."""
    found = {}
    for run in runs:
        if run.has_unknown_codes:
            raise RunError(
                f"{run.path} holds measurements of calibrated weights, but its notes name none, so nobody "
                "can tell which weights they are of. Put its notes/codes.json back, or leave the folder out."
            )
        if run.codes is not None:
            found.setdefault(run.codes, run.path)
    if len(found) > 1:
        (one, here), (other, there), *_ = found.items()
        raise RunError(
            f"{here} and {there} were calibrated apart (SHA-256 {one.sha256[:16]} and {other.sha256[:16]}), "
            "so their numbers are of different weights. Calibrate once and share that folder, or keep them "
            "apart."
        )


def _join_codes(runs: Sequence[RunFolder], target: RunFolder) -> None:
    """Put the calibrated weights into `target`; they are the same in every run (`_check_codes`)."""
    for run in runs:
        codes = run.codes
        if codes is not None:
            if run is not target:
                _copy(checked(codes, run.path), target.path / codes.file)
                target.notes.put("codes", codes)
            return


def _copy(source: Path, target: Path) -> None:
    try:
        make_folder(target.parent)
        with open_foreign(source, RunError, "Put the file back.", None) as read, atomic_file(target) as file:
            shutil.copyfileobj(read, file, 2**24)
    except OSError as error:
        raise RunError(
            f"{source} cannot be copied to {target} ({error.strerror or error}). Make room and join again; "
            "what was copied stays."
        ) from error
