"""Where rows come from: each file of `qprobe/data/sources/` declares one `Source`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.errors import SampleError
from qprobe.system.discovery import declared

SPREADSHEETS = (".xls", ".xlsx")
"""Suffixes of files that are not read, and that would be so many bad lines of JSON."""
_SPLIT = re.compile(
    r"(?:^|[-_. ])(train|training|test|testing|validation|valid|val|dev|eval|evaluation)(?:[-_. ]|$)"
)
Rows = Iterator[tuple[int, Any]]
"""(number from 1, row): a mapping, or a `Refused` that says why there is none."""


@dataclass(frozen=True)
class Source:
    """One kind of source.

    what: it in words, for the sentence that lists what can be read. row: what a row of it is called.
    takes: whether a value of --data, or of `data=`, is one; the first in `order` that does reads it.
    name: of a value, for messages. folder: that its image paths are relative to.
    rows: (value, split) -> its rows, read as they are asked for; raises SampleError if it cannot be read.
    in_memory: whether only Python can name one.
    """

    what: str
    row: str
    order: int
    takes: Callable[[Any], bool]
    name: Callable[[Any], str]
    folder: Callable[[Any], Path]
    rows: Callable[[Any, str | None], Rows]
    in_memory: bool = False


def sources() -> tuple[Source, ...]:
    """All of them, in the order in which they are asked."""
    found = declared("qprobe.data.sources", "SOURCE", Source)
    return tuple(sorted(found.values(), key=lambda x: x.order))


def names_of_files() -> str:
    """What data can be named as, in words: all sources but those in memory."""
    return ", ".join(x.what for x in sources() if not x.in_memory)


def source_of(data: Any) -> Source:
    """The source that reads `data`. Raises SampleError, with what can be read, if none does."""
    for one in sources():
        if one.takes(data):
            return one
    is_file = isinstance(data, str | Path)
    if is_file and Path(data).suffix.lower() in SPREADSHEETS and Path(data).is_file():
        raise SampleError(
            f"{Path(data).name} is a spreadsheet, which is not read. Save it as CSV or JSON Lines: in "
            "pandas, table.to_json('rows.jsonl', orient='records', lines=True); from Python, pass the "
            "DataFrame itself."
        )
    shown = f"Data file {data}" if is_file else f"Data of type {type(data).__name__}"
    kinds = [names_of_files(), *(f"or, from Python, {x.what}" for x in sources() if x.in_memory)]
    state = "does not exist" if is_file and not Path(data).exists() else "is none of these"
    folder = " A folder of images goes to --images." if is_file and Path(data).is_dir() else ""
    raise SampleError(f"{shown} {state}. Data is read from {', '.join(kinds)}.{folder}")


def refuse_split(split: str | None, what: str) -> None:
    """Raises SampleError where --split was passed for a source without splits."""
    if split is not None:
        raise SampleError(f"--split {split} does not apply to {what}, which has no splits. Leave it out.")


def split_in(name: str) -> str | None:
    """The split that a file or an array of this name holds, as people call splits; None if it says none."""
    found = _SPLIT.search(name.lower())
    return None if found is None else found[1]


def is_split(name: str) -> bool:
    """Whether `name` is that of a split."""
    return split_in(name) == name.lower()


def only_split(names: list[str], split: str | None, what: str) -> str:
    """The split that is meant; raises SampleError if it is not there, or several are and none was named."""
    known = ", ".join(names)
    if split is not None and split not in names:
        raise SampleError(f"{what} has no split {split!r}. Pass one of {known} to --split.")
    if split is None and len(names) != 1:
        raise SampleError(f"{what} has the splits {known}. Pass one of them to --split.")
    return split or names[0]


def rows_of_arrow(table: Any) -> list[dict[str, Any]]:
    """The rows of a table or a batch of Arrow; a column of classes of `datasets` holds their names."""
    rows = table.to_pylist()
    for column, names in _classes(table.schema.metadata or {}).items():
        for row in rows:
            number = row.get(column)
            if isinstance(number, int) and 0 <= number < len(names):
                row[column] = names[number]
    return rows


def _classes(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Names of the classes of each column that has some, as `datasets` writes them beside a schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        found = {name: x["names"] for name, x in features.items() if x.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}  # it was not written by `datasets`
    return {
        name: names
        for name, names in found.items()
        if isinstance(names, list) and all(isinstance(x, str) for x in names)
    }
