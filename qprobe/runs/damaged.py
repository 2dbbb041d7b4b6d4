"""Unit files that something cut short: set aside, so that a resumed scan measures them again; no torch.

Qprobe writes them whole or not at all, so this is the work of disks, copies and full quotas.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from qprobe.errors import RunError
from qprobe.registry.measures import CALIBRATION
from qprobe.runs.access import one_at_a_time
from qprobe.runs.folder import RunFolder
from qprobe.runs.notes import Remarks
from qprobe.runs.units import DamagedUnitError, number_of, stage_of

SUFFIX = ".damaged"
_LOCK = ".lock-damaged"


def set_aside_damaged(run: RunFolder) -> list[str]:
    """The unit files of `run` that are not whole, which are renamed to NAME.damaged, and named in its notes.

    Several processes may do so at once. Raises RunError, before anything is renamed, if a unit cannot be read
    or has other columns than this qprobe writes; and if the disk refuses.
    """
    units = run.path / "units"
    with one_at_a_time(run.path, _LOCK):  # another process could rename what this one has just measured again
        codes = sorted(units.glob(f"{CALIBRATION.name}-*.safetensors"))
        damaged = [name for name in run.unit_files() if _is_damaged(run, name)]
        damaged += [path.name for path in codes if _is_cut(path)]
        for name in damaged:
            try:
                run.set_aside(name, name + SUFFIX)
            except OSError as error:
                path = units / name
                raise RunError(f"{path} is damaged and cannot be renamed ({error.strerror}).") from error
        if damaged:
            _note_damaged(run)
        return damaged


def lost_units(run: RunFolder, stage: str) -> list[int]:
    """The numbers of the units of `stage` that were set aside and are not measured again, ascending."""
    aside = (path.with_suffix("") for path in (run.path / "units").glob(f"*.parquet{SUFFIX}"))
    return sorted(number_of(x.name) for x in aside if stage_of(x.name) == stage and not x.exists())


def _note_damaged(run: RunFolder) -> None:
    """Name in the run's notes, in one sentence, all files that were ever set aside."""
    names = sorted(path.stem for path in (run.path / "units").glob(f"*{SUFFIX}"))
    said = (
        f"Of these finished units the files were damaged, so they were set aside as NAME{SUFFIX} and "
        f"measured again where needed: {', '.join(names)}."
    )
    run.notes.put("damaged", Remarks((said,)))


def _is_damaged(run: RunFolder, name: str) -> bool:
    try:
        run.unit(name)
    except DamagedUnitError:
        return True
    except RunError:
        if (run.path / "units" / name).exists():
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
