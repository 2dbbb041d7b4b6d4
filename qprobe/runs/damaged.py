"""Unit files that something cut short: set aside, so that a resumed scan measures them anew; no torch.

Qprobe writes them whole or not at all, so this is the work of disks, copies and full quotas.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qprobe.errors import RunError
from qprobe.runs.store import (
    STAGE_CALIBRATION,
    DamagedUnitError,
    check_unit,
    read_scan,
    stage_of,
    unit_files,
    update_scan,
)
from qprobe.system.locks import open_lock, wait_for_lock

SUFFIX = ".damaged"
_LOCK = ".lock-damaged"
_TOLD = "Of these finished units the files were damaged, so they"


def set_aside_damaged(folder: Path) -> None:
    """Rename every unit file of `folder` that is not whole to NAME.damaged, and name them in the run's notes.

    Several processes may do so at once. Raises RunError, before anything is renamed, if a unit cannot be read
    or has other columns than this qprobe writes; and if the disk refuses.
    """
    units = Path(folder) / "units"
    with _one_at_a_time(Path(folder)):
        codes = sorted(units.glob(f"{STAGE_CALIBRATION}-*.safetensors"))
        damaged = [path for path in unit_files(folder).values() if _is_damaged(path)]
        damaged += [path for path in codes if _is_cut(path)]
        for path in damaged:
            try:
                with suppress(FileNotFoundError):
                    os.replace(path, path.with_name(path.name + SUFFIX))
            except OSError as error:
                raise RunError(f"{path} is damaged and cannot be renamed ({error.strerror}).") from error
        if damaged:
            note_damaged(folder)


def lost_units(folder: Path, stage: str) -> list[int]:
    """The numbers of the units of `stage` that were set aside and are not measured anew, ascending."""
    aside = (path.with_suffix("") for path in (Path(folder) / "units").glob(f"*.parquet{SUFFIX}"))
    return sorted(int(p.stem.rpartition("-")[2]) for p in aside if stage_of(p) == stage and not p.exists())


def note_damaged(folder: Path) -> None:
    """Name in the run's notes, in one sentence, all files that were ever set aside, if any were.

    Once more at the end of a scan, since processes that write scan.json at once lose one another's notes.
    """
    names = sorted(path.stem for path in (Path(folder) / "units").glob(f"*{SUFFIX}"))
    if names:
        said = f"{_TOLD} were set aside as NAME{SUFFIX} and measured anew where needed: {', '.join(names)}."
        record = read_scan(folder)
        before = (note for note in record.notes if not note.startswith(_TOLD))
        update_scan(folder, replace(record, notes=(*before, said)))


def _is_damaged(path: Path) -> bool:
    try:
        check_unit(path)
    except DamagedUnitError:
        return True
    except RunError:
        if path.exists():
            raise
    return False


def _is_cut(path: Path) -> bool:
    """Whether the header of a safetensors file does not fit its length."""
    try:
        with safe_open(path, framework="numpy"):
            return False
    except FileNotFoundError:
        return False
    except SafetensorError:
        return True


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """While open, no other process is in here: it could rename what this one has just measured anew."""
    try:
        lock = open_lock(folder / _LOCK)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror or error}). Make room or pass another --out."
        ) from error
    with lock:
        wait_for_lock(lock)
        yield
