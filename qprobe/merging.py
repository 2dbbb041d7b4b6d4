"""Joining the run folders of one scan that several machines measured; the model is not needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qprobe.atomic import write_atomic
from qprobe.errors import RunError
from qprobe.formats.codes_file import checked
from qprobe.measure.answers import FOLDER as ANSWERS
from qprobe.measure.shards import Shard, entered
from qprobe.measure.store import check_unit, differences, open_run, read_scan, unit_files, update_scan
from qprobe.records import CodesFile
from qprobe.scanning import units_left, write_findings
from qprobe.shown import FILE as SHOWN
from qprobe.wording import counted


@dataclass(frozen=True)
class Merged:
    """What a merge left. units: finished ones of all stages. missing: units that the layer table still needs.

    notes: sentences a reader must see.
    """

    run: Path
    units: int
    missing: int
    notes: tuple[str, ...]


def merge(runs: Sequence[Path], out: Path) -> Merged:
    """Join the finished units of `runs`, all of one specification, in the folder `out`, and make its tables.

    The folders stay as they are. `out` may be new, or hold units of the same scan already. Neither the order
    of `runs` nor how units were shared among them changes a digit. Where two hold the same unit with other
    numbers (machines round differently), the same one of them is taken in any order, and a note says so.
    Raises RunError if there is nothing to join, a folder is no run or damaged, or specifications differ.
    """
    if not runs:
        raise RunError("There is nothing to merge. Pass the run folders to join.")
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file, and the joined run is a folder. Pass another --out.")
    first = read_scan(runs[0])
    for run in runs[1:]:
        found = differences(first, read_scan(run))
        if found:
            raise RunError(
                f"{runs[0]} and {run} are different scans: {found}. Merge only runs of the same command with "
                "the same model, samples and versions."
            )
    never = first.unmeasured if "files" in first.spec else ()  # of samples that ran, all units decide
    fresh = replace(
        first, status="running", unmeasured=never, notes=_notes(runs), seconds={}, peak_bytes=None
    )
    with entered(out, Shard()):
        _check_codes([*runs, *([out] if (out / "scan.json").is_file() else [])])
        open_run(out, fresh)
        sources = [*runs, out]
        twice = _join_units(sources, out)
        _join_codes(runs, out)
        _join_answers(runs, out)
        missing = units_left(out)
        if not missing:
            write_findings(out)
    notes = (
        f"{counted(len(twice), 'unit')} with other numbers in several folders, as other machines round them; "
        f"one of each was taken: {', '.join(twice[:3])}{', ...' if len(twice) > 3 else ''}.",
    )
    return Merged(out, len(unit_files(out)), missing, notes if twice else ())


def _notes(runs: Sequence[Path]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for run in runs for note in read_scan(run).notes))


def _join_units(sources: Sequence[Path], out: Path) -> list[str]:
    """Put every unit of `sources` into `out`; the names of those that differ between them."""
    found: dict[str, dict[str, Path]] = {}
    for run in sources:
        for name, path in unit_files(run).items():
            check_unit(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found.setdefault(name, {}).setdefault(digest, path)
    for name, versions in sorted(found.items()):
        chosen = versions[min(versions)]
        if chosen.parent != out / "units":
            _copy(chosen, out / "units" / name)
    return sorted(name.removesuffix(".parquet") for name, versions in found.items() if len(versions) > 1)


def _join_answers(runs: Sequence[Path], out: Path) -> None:
    """Put the answers and what reports show of the samples into `out`; runs of one scan have equal ones."""
    for run in runs:
        for path in (*sorted((run / ANSWERS).glob("*.json")), *run.glob(SHOWN)):
            target = out / path.relative_to(run)
            if not target.exists():
                _copy(path, target)


def _codes(runs: Sequence[Path]) -> dict[CodesFile | None, Path]:
    """The calibrated weights that `runs` measured, each with a run that has them."""
    return {record.codes: run for run in runs if (record := read_scan(run)).codes is not None}


def _check_codes(runs: Sequence[Path]) -> None:
    """Raises RunError, before anything is copied, if `runs` measured different calibrated weights."""
    found = _codes(runs)
    if len(found) > 1:
        (one_codes, one), (other_codes, other), *_ = found.items()
        hashes = " and ".join(c.sha256[:12] for c in (one_codes, other_codes) if c is not None)
        raise RunError(
            f"{one} and {other} were calibrated apart, so their numbers are of different weights "
            f"({hashes}). Calibrate once and share that folder, or keep them apart."
        )


def _join_codes(runs: Sequence[Path], out: Path) -> None:
    """Put the calibrated weights, the same ones in every run, into `out`."""
    for codes, run in _codes(runs).items():
        assert codes is not None
        if run != out:
            _copy(checked(codes, run), out / codes.file)
        update_scan(out, replace(read_scan(out), codes=codes))


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, source.read_bytes())
    except OSError as error:
        raise RunError(
            f"{source} cannot be copied to {target} ({error.strerror or error}). Make room and merge again; "
            "what was copied stays."
        ) from error
