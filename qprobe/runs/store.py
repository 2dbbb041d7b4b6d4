"""The run folder: `scan.json` and the finished units under `units/`; no torch.

A unit is one piece of work of one stage, numbered from 0: the rows of one batch of samples, or all weights.
Each is one parquet file with a fixed schema, written whole or not at all, so that resuming a scan is running
its missing units and joining two scans of one specification is putting their unit files in one folder.
Units hold sums and counts only; `choosing.table` turns them into the layer table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qprobe.errors import RunError
from qprobe.records import Scan
from qprobe.system.decoding import strict_json
from qprobe.system.files import remove_left_behind, write_atomic, write_first

_TEXT, _COUNT, _SUM = pa.string(), pa.int64(), pa.float64()

UNIT_SCHEMAS: Mapping[str, Mapping[str, pa.DataType]] = {
    "weights": {
        "layer": _TEXT, "n": _COUNT, "signal": _SUM, "noise": _SUM, "nonfinite": _COUNT, "peak": _SUM,
    },
    "outputs": {
        "sample": _TEXT, "layer": _TEXT, "tokens": _COUNT,
        "activation_n": _COUNT, "activation_signal": _SUM, "activation_noise": _SUM,
        "activation_nonfinite": _COUNT, "activation_peak": _SUM, "peak_token": _COUNT, "peak_kind": _TEXT,
        "propagated_n": _COUNT, "propagated_signal": _SUM, "propagated_noise": _SUM,
        "propagated_nonfinite": _COUNT,
    },
    "kl": {"sample": _TEXT, "choice": _TEXT, "answer_tokens": _COUNT, "kl_sum": _SUM, "top1_agree": _COUNT},
    "sensitivity": {"sample": _TEXT, "layer": _TEXT, "answer_tokens": _COUNT, "kl_sum": _SUM},
    "isolated": {"sample": _TEXT, "layer": _TEXT, "answer_tokens": _COUNT, "kl_sum": _SUM},
    "calibration": {
        "layer": _TEXT, "tokens": _COUNT, "error": _SUM, "damping": _SUM, "why": _TEXT,
    },
}  # fmt: skip
"""Columns of each stage. Sums are over the sample's tokens; kl_sum is in nats; null means not measured.

calibration: tokens seen; error of the outputs as a share of rounding to nearest; why it is rounded to nearest
after all, "" where it is not.
"""

STAGE_CALIBRATION = "calibration"
ANSWERS = "answers"
"""The folder of generated answers in a run folder, one file for each batch."""

# A list of kept layers measured on held-out samples, and a list of layers measured one by one, have stages
# of their own with the schema of "kl": `choice_stage` and `ablation_stage`.
_CHOICE, _ABLATION = "heldout", "ablation"

# What names a row: it may stand in one unit only, or its sums would count twice.
_ROW_KEYS = {
    "weights": ["layer"],
    "outputs": ["sample", "layer"],
    "kl": ["sample", "choice"],
    "sensitivity": ["sample", "layer"],
    "isolated": ["sample", "layer"],
    STAGE_CALIBRATION: ["layer"],
}

# What differs wherever the model, the processor or the seed does: told where none of them is.
_FOLLOWS = ("spec.calibration", "spec.isolated", "spec.held_out", "spec.reading")
_INPUTS = "spec.processor"  # differs with the processor or with the samples
_SHA256 = re.compile("[0-9a-f]{64}")

_UNIT_NAME = re.compile(r"([a-z0-9-]+)-[0-9]{5,}\.parquet")

# Fields that scan.json may lack: runs of before there were calibrated weights.
_ADDED: Mapping[Any, set[str]] = {Scan: {"codes"}}


class DamagedUnitError(RunError):
    """A unit file is not whole."""


def spec_key(spec: dict) -> str:
    """SHA-256 (hex) of the canonical JSON of `spec`: the order of its keys does not enter it."""
    return hashlib.sha256(_canonical(spec).encode()).hexdigest()


def choice_stage(kept: frozenset[str]) -> str:
    """The stage, with the schema of "kl", of the held-out measurements with the layers `kept` in 16-bit.

    Equal lists share their units, whatever they are called.
    """
    return f"{_CHOICE}-{_digest(kept)}"


NEAREST_STAGE = f"{_CHOICE}-nearest"
"""The same with nothing kept and every weight rounded to nearest, in a run of calibrated weights."""


def ablation_stage(layers: frozenset[str]) -> str:
    """The stage, with the schema of "kl", of the KL of single layers among `layers`."""
    return f"{_ABLATION}-{_digest(layers)}"


def _digest(names: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def open_run(folder: Path, scan: Scan) -> None:
    """Make `folder` ready for the units of `scan`; if it holds the same scan already, it is resumed as it is.

    Of several processes that open it at once with different scans, one gets the folder.
    Raises RunError if the folder belongs to another specification, model or format (every difference is
    named, old -> new), holds units of an unknown scan, is damaged, or cannot be written.
    """
    folder = Path(folder)
    path = folder / "scan.json"
    try:
        (folder / "units").mkdir(parents=True, exist_ok=True)
        remove_left_behind(folder)
    except OSError as error:
        raise RunError(_cannot_write(folder, error)) from error
    if not path.exists():
        # Looked for once more, as another process may have begun between.
        if any((folder / "units").glob("*.parquet")) and not path.exists():
            raise RunError(
                f"{folder} holds finished units but no scan.json, so nobody can tell which scan they belong "
                "to. Pass another --out, or put its scan.json back."
            )
        write_file(path, _scan_bytes(scan), write_first)
    found = differences(read_scan(folder), scan)
    if found:
        raise RunError(f"{folder} holds another scan, which differs in {found}. Pass another --out.")


def differences(old: Scan, new: Scan) -> str:
    """In how many places, and which, two scans differ that must be equal to share units; or ""."""
    found = list(_differences("", _identity(old), _identity(new)))
    if not found:
        return ""
    first = [place for place in found if not place.startswith(_FOLLOWS)]
    has_cause = any(not place.startswith(_INPUTS) for place in first)
    told = (first if has_cause else [*first, *(place for place in found if place not in first)])[:8]
    left = f"; and {len(found) - len(told)} more{' in the samples' if told == first else ''}"
    shown = "; ".join(told) + (left if len(found) > len(told) else "")
    return f"{len(found)} {'place' if len(found) == 1 else 'places'}: {shown}"


def unknown_codes(folder: Path, scan: Scan) -> bool:
    """True if `folder`, of `scan`, has units of calibrated weights, but nobody can tell which weights."""
    measured = (name for name in unit_files(folder) if not name.startswith(f"{STAGE_CALIBRATION}-"))
    return scan.format.is_calibrated and scan.codes is None and any(measured)


def read_scan(folder: Path) -> Scan:
    """The scan that `folder` belongs to; raises RunError if its scan.json is missing or damaged."""
    path = Path(folder) / "scan.json"
    try:
        return _decode(Scan, strict_json(path.read_bytes()), "scan")
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(
            f"{folder} is no run folder: it has no scan.json. Pass the folder of a scan."
        ) from None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}). Make it readable.") from error
    except ValueError as error:
        raise RunError(
            f"{path} is damaged ({error}). Put a copy of it back, or scan again with another --out."
        ) from None


def update_scan(folder: Path, scan: Scan) -> None:
    """Write scan.json whole or not at all; raises RunError if the disk refuses."""
    write_file(Path(folder) / "scan.json", _scan_bytes(scan))


def write_unit(folder: Path, stage: str, unit: int, frame: pd.DataFrame) -> None:
    """Write `frame` as the finished unit number `unit` of `stage`, replacing an earlier one.

    frame: exactly the columns of the stage's schema, in any order, or nothing at all; NaN or None is stored
    as null. Equal frames give equal bytes. Raises RunError if the disk refuses.
    """
    schema = UNIT_SCHEMAS[_family(stage)]
    complete = frame if len(frame.columns) or len(frame) else pd.DataFrame(columns=list(schema))
    assert set(complete.columns) == set(schema), sorted(set(complete.columns) ^ set(schema))
    arrays = [pa.Array.from_pandas(complete[name], type=kind) for name, kind in schema.items()]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(zip(schema, arrays, strict=True))), buffer, compression="zstd")
    write_file(_unit_path(Path(folder), stage, unit), buffer.getvalue().to_pybytes())


def missing_units(folder: Path, stage: str, count: int) -> list[int]:
    """The numbers in 0 .. count - 1 whose unit of `stage` is not finished, ascending."""
    return [unit for unit in range(count) if not _unit_path(Path(folder), stage, unit).exists()]


def read_units(folder: Path, stage: str) -> pd.DataFrame:
    """All finished units of `stage` in unit order; no rows if there are none.

    Columns as in the stage's schema; counts with a null among them come as floats, nulls as NaN.
    Raises RunError if a file is damaged, or if a row stands in two units (folders joined that were cut
    into different batches).
    """
    schema = pa.schema(list(UNIT_SCHEMAS[_family(stage)].items()))
    keys = _ROW_KEYS[_family(stage)]
    tables = [_read_unit(path, schema) for path in _unit_paths(Path(folder), stage)]
    frame = pa.concat_tables([schema.empty_table(), *tables]).to_pandas()
    repeated = frame[frame.duplicated(keys)]
    if len(repeated):
        row = ", ".join(f"{key} {repeated.iloc[0][key]}" for key in keys)
        raise RunError(
            f"{folder} holds {stage} of {row} in two units, so it would count twice: units of differently "
            "cut scans were put together. Join only scans with the same batch size, or scan again."
        )
    return frame


def unit_files(folder: Path) -> dict[str, Path]:
    """Every finished unit of a known stage in `folder`, by file name."""
    found = sorted((Path(folder) / "units").glob("*.parquet"))
    return {path.name: path for path in found if stage_of(path) is not None}


def check_unit(path: Path) -> None:
    """Raises RunError unless `path`, one of `unit_files`, has the columns of its stage.

    That is a DamagedUnitError where it is not whole.
    """
    stage = stage_of(path)
    assert stage is not None, path
    _read_unit(path, pa.schema(list(UNIT_SCHEMAS[_family(stage)].items())))


def stage_of(path: Path) -> str | None:
    """The stage of a unit file by its name; None if it is no unit of a known one."""
    match = _UNIT_NAME.fullmatch(path.name)
    return match[1] if match and _family(match[1]) in UNIT_SCHEMAS else None


def _family(stage: str) -> str:
    return "kl" if stage.startswith((f"{_CHOICE}-", f"{_ABLATION}-")) else stage


def _unit_path(folder: Path, stage: str, unit: int) -> Path:
    assert _family(stage) in UNIT_SCHEMAS and unit >= 0, (stage, unit)
    return folder / "units" / f"{stage}-{unit:05d}.parquet"


def _unit_paths(folder: Path, stage: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(stage)}-([0-9]{{5,}})\.parquet")
    found = [(pattern.fullmatch(path.name), path) for path in (folder / "units").glob(f"{stage}-*.parquet")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _read_unit(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error}). Make it readable.") from None
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise DamagedUnitError(
            f"{path} is damaged ({reason}). Scan again into the same folder: what is damaged is set aside, "
            "and only that is measured anew."
        ) from None
    if not table.schema.equals(schema):
        raise RunError(
            f"{path} has other columns than this qprobe writes ({', '.join(table.schema.names)}). "
            "Scan again with another --out."
        )
    return table


def _scan_bytes(scan: Scan) -> bytes:
    return (json.dumps(asdict(scan), indent=1, allow_nan=False) + "\n").encode()


def write_file(path: Path, data: bytes, how: Callable[[Path, bytes], object] = write_atomic) -> None:
    """Write a file of a run folder whole or not at all; raises RunError if the disk refuses."""
    try:
        how(path, data)
    except OSError as error:
        raise RunError(_cannot_write(path, error)) from error


def _cannot_write(path: Path, error: OSError) -> str:
    return (
        f"{path} cannot be written ({error.strerror or error}). Make room or pass another --out; "
        "what is finished stays, and the same command resumes it."
    )


def _identity(scan: Scan) -> dict[str, Any]:
    """What two scans must share to share units; JSON values."""
    data = {
        "spec": scan.spec,
        "model": {"fingerprint": scan.model.fingerprint},
        "format": asdict(scan.format),
    }
    return json.loads(_canonical(data))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _differences(where: str, old: Any, new: Any) -> Iterator[str]:
    """`spec.seed: 0 -> 1` for every leaf in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            name = f"{where}.{key}" if where else key
            if key in old and key in new:
                yield from _differences(name, old[key], new[key])
            else:
                yield f"{name}: {_shown(old, key)} -> {_shown(new, key)}"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{where}[{index}]", a, b)
    elif isinstance(old, list) and isinstance(new, list):
        yield f"{where}: {len(old)} entries -> {len(new)} entries"
    elif _canonical(old) != _canonical(new):
        yield f"{where}: {_short(old)} -> {_short(new)}"


def _shown(value: dict[str, Any], key: str) -> str:
    return _short(value[key]) if key in value else "(absent)"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else _canonical(value)
    if _SHA256.fullmatch(text):
        return f"{text[:12]}..."
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of the fields of a dataclass; finding them takes longer than all else about a value."""
    hints = get_type_hints(kind)
    return {x.name: hints[x.name] for x in fields(kind)}


def _decode(kind: Any, value: Any, where: str) -> Any:
    """The JSON value `value` as `kind` (dataclass, tuple, dict, Literal, X | None, int, float, str).

    Raises ValueError naming the place if it does not fit.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(kind)
        names = hints.keys()
        # What came later than the first version has a default, and older files lack it.
        needed = names - _ADDED.get(kind, set())
        if not needed <= value.keys() <= names:
            wrong = (needed - value.keys()) | (value.keys() - names)
            raise ValueError(f"{where} lacks or has too much of: {', '.join(sorted(wrong))}")
        return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in value})  # pyright: ignore
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(
                _decode(k, x, f"{where}[{i}]") for i, (k, x) in enumerate(zip(kinds, value, strict=True))
            )
    elif origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], x, f"{where}.{key}") for key, x in value.items()}
    elif origin in (Union, UnionType):
        inner = next(x for x in arguments if x is not NoneType)
        return None if value is None else _decode(inner, value, where)
    elif (
        (origin is Literal and value in arguments)
        or (kind is dict and isinstance(value, dict))
        or (kind is float and type(value) in (int, float))
        or (kind in (int, str, bool) and type(value) is kind)
    ):
        return value
    raise ValueError(f"{where} is {_short(value)}")
