"""Rows in memory: a list, an iterator, a Dataset of `datasets`, or a DataFrame of pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qprobe.data.reasons import shown
from qprobe.data.source import Rows, Source, only_split, refuse_split, rows_of_arrow
from qprobe.errors import SampleError
from qprobe.system.wording import counted, shortened


def rows_of_dataset(data: Any) -> Rows:
    """The rows of a `datasets.Dataset`, images as the bytes of their files, classes by their names; of a
    DataFrame, with None for what is missing; others as they are."""
    if hasattr(data, "with_format") and hasattr(data, "num_rows"):  # else images would be decoded here
        stored = data.with_format("arrow")
        batches = (stored[start : start + 64] for start in range(0, data.num_rows, 64))
        yield from enumerate((row for table in batches for row in rows_of_arrow(table)), start=1)
    elif hasattr(data, "columns") and hasattr(data, "to_dict"):
        yield from enumerate(data.astype(object).where(data.notna(), None).to_dict("records"), start=1)
    else:
        yield from enumerate(data, start=1)


def _rows(data: Any, split: str | None) -> Rows:
    if isinstance(data, Mapping):  # a DatasetDict
        _check_splits(data)
        data = data[only_split([str(x) for x in data], split, "the data set")]
    else:
        refuse_split(split, "rows in memory")
    number = 0
    try:
        for number, row in rows_of_dataset(data):
            yield number, _plain(row)
    except Exception as error:  # of the user's own iterator, or of a data set that fails to read
        said = shortened(" ".join(str(error).split()), 200)
        raise SampleError(
            f"The data stopped after {counted(number, 'row')} with {type(error).__name__}"
            f"{f' ({said})' if said else ''}. Pass an iterator that yields all of its rows."
        ) from error
    if number == 0:
        raise SampleError("The data has no rows. Pass rows with a prompt or a conversation.")


def _plain(value: Any) -> Any:
    """`value` with lists for arrays of numpy that hold no numbers, as pandas reads the lists of Parquet."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    dtype = getattr(value, "dtype", None)
    if getattr(dtype, "kind", "") in ("O", "U") and getattr(value, "ndim", 0):
        return [_plain(x) for x in value.tolist()]
    return value


def _check_splits(data: Mapping[Any, Any]) -> None:
    """Raises SampleError unless each value is the rows of a split."""
    for name, rows in data.items():
        first = rows[0] if isinstance(rows, list | tuple) and rows else {}
        if (
            isinstance(rows, str | bytes | Mapping)
            or not isinstance(rows, Iterable)
            or not isinstance(first, Mapping)
        ):
            raise SampleError(
                f"The data is one {type(data).__name__}, and its {shown(str(name))} holds no rows. Pass a "
                "list of rows, each with a prompt or a conversation."
            )


def _takes(data: Any) -> bool:
    return isinstance(data, Iterable) and not isinstance(data, str | bytes | Path)


SOURCE = Source(
    what="rows in memory",
    row="row",
    order=95,
    takes=_takes,
    name=lambda _: "data",
    folder=lambda _: Path(),
    rows=_rows,
    in_memory=True,
)
