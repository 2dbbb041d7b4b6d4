"""Joining the run folders of one scan that several machines measured; the model is not needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qprobe.errors import RunError
from qprobe.formats.codes_file import checked
from qprobe.runs.needed import needed_units, units_left
from qprobe.runs.shards import entered
from qprobe.runs.shown import FILE as SHOWN
from qprobe.runs.store import (
    ANSWERS,
    check_unit,
    differences,
    open_run,
    read_scan,
    unit_files,
    unknown_codes,
    update_scan,
)
from qprobe.scanning.findings import write_findings
from qprobe.system.files import write_atomic
from qprobe.system.processes import Shard
from qprobe.system.wording import counted


@dataclass(frozen=True)
class Joined:
    """What joining left. units: finished ones of all stages. missing: units that the layer table still needs.

    notes: sentences a reader must see.
    """

    run: Path
    units: int
    missing: int
    notes: tuple[str, ...]


def join(runs: Sequence[Path], out: Path) -> Joined:
    """Join the finished units of `runs`, all of one specification, in the folder `out`, and make its tables.

    The folders stay as they are. `out` may be new, or hold units of the same scan already. Neither the order
    of `runs` nor how units were shared among them changes a digit. Where two hold the same unit with other
    numbers (machines round differently), the same one of them is taken in any order, and a note says so.
    Raises RunError if there is nothing to join, a folder is no run or damaged, or specifications or
    calibrated weights differ; nothing is copied then.
    """
    if not runs:
        raise RunError("There is nothing to join. Pass the run folders of one scan.")
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file, and the joined run is a folder. Pass another --out.")
    first = read_scan(runs[0])
    for run in runs[1:]:
        found = differences(first, read_scan(run))
        if found:
            raise RunError(
                f"{runs[0]} and {run} are different scans: {found}. Join only runs of the same command with "
                "the same model, samples and versions."
            )
    needed_units(first.spec)  # refuses what it cannot read before a folder is made
    never = first.unmeasured if "files" in first.spec else ()  # of samples that ran, all units decide
    fresh = replace(
        first, status="running", unmeasured=never, notes=_notes(runs), seconds={}, peak_bytes=None, codes=None
    )
    _check_codes(runs)  # before a folder is made
    with entered(out, Shard()):
        _check_codes([*runs, *([out] if (out / "scan.json").is_file() else [])])
        open_run(out, fresh)
        sources = [*runs, out]
        _join_codes(runs, out)  # first: units without the codes that they are of would be refused later
        twice = _join_units(sources, out)
        _join_answers(runs, out)
        missing = units_left(out)
        if not missing:
            write_findings(out)
    notes = (
        f"{counted(len(twice), 'unit')} with other numbers in several folders, as other machines round them; "
        f"one of each was taken: {', '.join(twice[:3])}{', ...' if len(twice) > 3 else ''}.",
    )
    return Joined(out, len(unit_files(out)), missing, notes if twice else ())


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


def _check_codes(runs: Sequence[Path]) -> None:
    """Raises RunError unless all measurements of `runs` are of the same calibrated weights, if of any."""
    found = {}
    for run in runs:
        scan = read_scan(run)
        if unknown_codes(run, scan):
            raise RunError(
                f"{run} holds measurements of calibrated weights, but its scan.json names none, so nobody "
                "can tell which weights they are of. Put its scan.json back, or leave the folder out."
            )
        if scan.codes is not None:
            found.setdefault(scan.codes, run)
    if len(found) > 1:
        (one, here), (other, there), *_ = found.items()
        raise RunError(
            f"{here} and {there} were calibrated apart (SHA-256 {one.sha256[:16]} and {other.sha256[:16]}), "
            "so their numbers are of different weights. Calibrate once and share that folder, or keep them "
            "apart."
        )


def _join_codes(runs: Sequence[Path], out: Path) -> None:
    """Put the calibrated weights into `out`; they are the same in every run (`_check_codes`)."""
    for run in runs:
        codes = read_scan(run).codes
        if codes is not None:
            if run != out:
                _copy(checked(codes, run), out / codes.file)
            update_scan(out, replace(read_scan(out), codes=codes))
            return


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, source.read_bytes())
    except OSError as error:
        raise RunError(
            f"{source} cannot be copied to {target} ({error.strerror or error}). Make room and join again; "
            "what was copied stays."
        ) from error
