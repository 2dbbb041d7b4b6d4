"""Unit files: what a finished unit of each stage holds, and how it is named, written and read; no torch.

A unit is one piece of work of one stage, numbered from 0: the rows of one batch of samples, or all weights.
Each is one parquet file with a fixed schema, written whole or not at all, so that resuming a scan is running
its missing units and joining two scans of one specification is putting their unit files in one folder.
Units hold sums and counts only; `qprobe.runs.layers.table` turns them into the layer table.

The schema of each stage is declared in `qprobe.registry.measures`, with the columns that name a row. The
experts of a fused weight are rows of one layer, told apart by the column "expert" (null for a plain linear).
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qprobe.errors import RunError
from qprobe.registry import measures
from qprobe.system.headers.parquet import columns_of, page_sizes
from qprobe.system.wording import shortened

_KINDS = {"text": pa.string(), "count": pa.int64(), "number": pa.float64()}

# A list of kept layers measured on held-out samples, or on those of another kind, and a list of layers that
# are measured one by one have stages of their own with the schema of "kl": `candidate_stage`, `other_stage`
# and `ablation_stage`.
_CANDIDATE, _OTHER, _ABLATION = "heldout", "others", "ablation"

_UNIT_NAME = re.compile(r"([a-z0-9-]+)-([0-9]{5,})\.parquet")


UNIT_CELLS = 2**26
UNIT_BYTES = 8 * UNIT_CELLS
"""Of a unit, which has a row per layer (or expert) and sample of a batch, a million cells at most; of its
file, and of its texts. A few bytes of Parquet can stand for any number of rows, or copies of a long text."""
_ENCODINGS = {0, 2, 3, 4, 8}  # those that pyarrow writes: plain, dictionaries and their indices, run lengths


_GIVEN = ("answer_tokens", "n")
"""Columns of counts that samples and weights decide, whatever is computed of them."""


_PEAK_KIND = "peak_kind"


class DamagedUnitError(RunError):
    """A unit file is not whole."""


def candidate_stage(kept: frozenset[str]) -> str:
    """The stage, with the schema of "kl", of the held-out measurements with the layers `kept` in 16-bit.

    Equal lists share their units, whatever they are called.
    """
    return f"{_CANDIDATE}-{_digest(kept)}"


NEAREST_STAGE = f"{_CANDIDATE}-nearest"
"""The same with nothing kept and every weight rounded to nearest, in a run of calibrated weights."""


def other_stage(kept: frozenset[str] | None, batches: Sequence[Sequence[str]]) -> str:
    """The same of measurements on samples of another kind, of which the key of a run says nothing.

    kept: None for every weight rounded to nearest. batches: the digests of the samples of each.
    """
    what = "nearest" if kept is None else _digest(kept)
    samples = "\n".join(" ".join(batch) for batch in batches)
    return f"{_OTHER}-{_digest(frozenset({what, samples}))}"


def ablation_stage(layers: frozenset[str]) -> str:
    """The stage, with the schema of "kl", of the KL of single layers among `layers`."""
    return f"{_ABLATION}-{_digest(layers)}"


def is_ablation(stage: str) -> bool:
    """Whether `stage` is one of `ablation_stage`."""
    return stage.startswith(f"{_ABLATION}-")


def _digest(names: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def unit_name(stage: str, unit: int) -> str:
    """The name of the file of the unit number `unit` of `stage`."""
    assert declared_stage(stage) is not None and unit >= 0, (stage, unit)
    return f"{stage}-{unit:05d}.parquet"


def stage_of(name: str) -> str | None:
    """The stage of a unit file by its name; None if it is no unit of a known one."""
    match = _UNIT_NAME.fullmatch(name)
    return match[1] if match and declared_stage(match[1]) is not None else None


def number_of(name: str) -> int:
    """The number of a unit by the name of its file."""
    match = _UNIT_NAME.fullmatch(name)
    assert match is not None, name
    return int(match[2])


def encode_unit(stage: str, frame: pd.DataFrame) -> tuple[bytes, pa.Table]:
    """(the bytes of the file, the table they hold) of a unit of `stage`. Equal frames give equal bytes.

    frame: exactly the columns of the stage's schema, in any order, or nothing at all; NaN or None is stored
    as null.
    """
    schema = _schema(stage)
    complete = frame if len(frame.columns) or len(frame) else pd.DataFrame(columns=unit_columns(stage))
    assert set(complete.columns) == set(schema.names), sorted(set(complete.columns) ^ set(schema.names))
    arrays = [pa.Array.from_pandas(complete[field.name], type=field.type) for field in schema]
    table = pa.table(dict(zip(schema.names, arrays, strict=True)))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue().to_pybytes(), table


def decode_unit(path: Path, data: bytes) -> pa.Table:
    """The table in `data`, the bytes of the unit file `path`.

    Raises DamagedUnitError where they are not whole, RunError where they have other columns than the stage.
    """
    stage = stage_of(path.name)
    assert stage is not None, path
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            _check_size(file.metadata, io.BytesIO(data))
            found = file.schema_arrow
        table = _read(data, found) if found.equals(_schema(stage)) else found.empty_table()
        table.validate(full=True)  # of texts, too, that they are UTF-8
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = shortened(str(error).splitlines()[0], 120)
        raise DamagedUnitError(
            f"{path} is damaged ({reason}). Scan again into the same folder: what is damaged is set aside, "
            "and only that is measured again."
        ) from None
    if not table.schema.equals(_schema(stage)):
        raise RunError(
            f"{path} has other columns than this qprobe writes "
            f"({shortened(', '.join(table.schema.names), 300)}). Scan again with another --out."
        )
    return table


def _check_size(found: pq.FileMetaData, pages: io.BytesIO) -> None:
    """Raises ArrowException if a file that says this of itself is none of ours: reading it could take all.

    pages: the same file, whose pages are looked at since a footer may say anything.
    """
    if found.num_rows * found.num_columns > UNIT_CELLS:
        raise pa.ArrowException(f"it claims {found.num_rows:,} rows of {found.num_columns:,} columns")
    for group in map(found.row_group, range(found.num_row_groups)):
        if group.total_byte_size > UNIT_BYTES:
            raise pa.ArrowException(f"it claims {group.total_byte_size:,} bytes")
    for column in chain.from_iterable(columns_of(pages)):
        if not _ENCODINGS >= column.encodings or column.values > UNIT_CELLS:
            raise pa.ArrowException(f"{column.name} is stored otherwise")
        if (size := sum(page_sizes(pages, column))) > UNIT_BYTES:
            raise pa.ArrowException(f"{column.name} would take {size:,} bytes")


def _read(data: bytes, schema: pa.Schema) -> pa.Table:
    """The rows, once it is known how long their texts are together."""
    texts = [x.name for x in schema if x.type == pa.string()]
    table = pq.read_table(pa.BufferReader(data), read_dictionary=texts)
    size = 0
    for chunk in (chunk for name in texts for chunk in table[name].chunks):
        lengths = pc.call_function("binary_length", [chunk.dictionary]).take(chunk.indices)
        size += pc.call_function("sum", [lengths]).as_py() or 0
    if size > UNIT_BYTES:
        raise pa.ArrowException(f"its texts would take {size:,} bytes")
    return table.cast(schema)


def rows_of(folder: Path, stage: str, tables: Iterable[pa.Table]) -> pd.DataFrame:
    """The rows of `tables`, the finished units of `stage` in `folder`, in their order; no rows without any.

    Columns as in the stage's schema; counts with a null among them come as floats, nulls as NaN.
    Raises RunError if a row stands in two units (folders joined that were cut into different batches).
    """
    frame = pa.concat_tables([_schema(stage).empty_table(), *tables]).to_pandas()
    keys = list(_stage(stage).key)
    repeated = frame[frame.duplicated(keys)]
    if len(repeated):
        row = ", ".join(f"{key} {repeated.iloc[0][key]}" for key in keys)
        raise RunError(
            f"{folder} holds {stage} of {row} in two units, so it would count twice: units of differently "
            "cut scans were put together. Join only scans with the same batch size, or scan again."
        )
    return frame


def largest_difference(one: pa.Table, other: pa.Table) -> float:
    """How far two units of one stage are from each other, as a share of the largest value of the column.

    Of counts those in `_GIVEN` alone are compared: where a peak was differs from run to run, see
    `moved_peaks`. Infinite where they, names, rows or nulls differ, or which values are non-finite.
    """
    most = 0.0
    for name in one.column_names:
        a, b = one[name], other[name]
        is_given = name in _GIVEN or (pa.types.is_string(a.type) and name != _PEAK_KIND)
        if is_given and not a.equals(b):
            return math.inf
        if pa.types.is_floating(a.type):
            if len(a) != len(b) or not a.is_null().equals(b.is_null()):
                return math.inf
            mine, others = (x.drop_null().to_numpy() for x in (a, b))
            is_finite = np.isfinite(mine)  # beside an infinite value every difference would be none, or NaN
            if not np.array_equal(mine[~is_finite], others[~is_finite], equal_nan=True):
                return math.inf
            mine, others = mine[is_finite], others[is_finite]
            far = np.abs(mine - others).max(initial=0.0)
            most = max(most, float(far / np.abs(mine).max(initial=0.0)) if far else 0.0)
    return most


def moved_peaks(one: pa.Table, other: pa.Table) -> int:
    """How many peaks are at tokens of another kind (vision, text, answer) in two units of the same rows."""
    if _PEAK_KIND not in one.column_names:
        return 0
    kinds = zip(one[_PEAK_KIND].to_pylist(), other[_PEAK_KIND].to_pylist(), strict=True)
    return sum(a != b for a, b in kinds)


def unit_columns(stage: str) -> list[str]:
    """The columns of the units of `stage`."""
    return list(_stage(stage).schema)


def declared_stage(stage: str) -> measures.Stage | None:
    """The declaration of `stage`; None if there is no such stage."""
    name = measures.KL.name if stage.startswith((f"{_CANDIDATE}-", f"{_OTHER}-", f"{_ABLATION}-")) else stage
    return next((x for x in measures.stages() if x.name == name), None)


def _stage(stage: str) -> measures.Stage:
    found = declared_stage(stage)
    assert found is not None, stage
    return found


def _schema(stage: str) -> pa.Schema:
    return pa.schema([(name, _KINDS[kind]) for name, kind in _stage(stage).schema.items()])
