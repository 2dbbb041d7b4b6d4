"""CSV and TSV: a table of text whose first line names the columns."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qprobe.data.reasons import Refused, shown
from qprobe.data.shapes.choices import written_list
from qprobe.data.source import Rows, Source, refuse_split
from qprobe.data.sources.json_lines import LONGEST_LINE
from qprobe.errors import SampleError
from qprobe.system.packed import unpacked

_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_FIX = "Pass a table whose first line names its columns to --data."
_DELIMITERS = ("\t", ",", ";")  # Excel writes the last where a comma is in numbers
_LISTS = (
    "messages", "conversations", "conversation", "texts", "images", "answers", "choices", "options",
)  # fmt: skip
"""Columns whose cells hold a list, as a text that JSON or Python wrote."""


def _takes(data: Any) -> bool:
    if not isinstance(data, str | Path):
        return False
    return str(data).lower().endswith(_SUFFIXES) and Path(data).exists() and not Path(data).is_dir()


def _rows(data: Any, split: str | None) -> Rows:
    path = Path(data)
    refuse_split(split, path.name)
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))  # an image in base64 is one cell
    number = 0
    with unpacked(path, SampleError, _FIX) as file:
        begins = file.read(2)
        file.seek(0)
        encoding = "utf-16" if begins in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        text = io.TextIOWrapper(file, encoding, newline="")
        try:
            lines = _lines(text)
            columns = _columns(next(lines, []), path)
            for number, cells in enumerate(lines, start=1):
                yield number, _row(columns, cells)
        except UnicodeDecodeError as error:
            raise SampleError(
                f"{path} is not UTF-8 (behind row {number}: {error.reason}). Save it as UTF-8."
            ) from None
        except csv.Error as error:
            raise SampleError(f"{path} is no complete table (behind row {number}: {error}). {_FIX}") from None
    if number == 0:
        raise SampleError(f"{path} has no rows. {_FIX}")


def _lines(text: io.TextIOWrapper) -> Iterator[list[str]]:
    """The cells of each line that holds some, the columns' names first."""
    head = text.readline(LONGEST_LINE)
    text.seek(0)
    delimiter = max(_DELIMITERS, key=head.count)
    return filter(None, csv.reader(_bounded(text), delimiter=delimiter, strict=True))


def _bounded(text: io.TextIOWrapper) -> Iterator[str]:
    """The lines of `text`; csv.Error for one too long to be held, as a few bytes of gzip can stand for."""
    for line in iter(lambda: text.readline(LONGEST_LINE + 1), ""):
        if len(line) > LONGEST_LINE:
            raise csv.Error(f"a line is longer than {LONGEST_LINE // 2**20:,} MiB")
        yield line


def _columns(cells: list[str], path: Path) -> list[str]:
    names = [x.strip() for x in cells]
    if not all(names) or len(set(names)) < len(names):
        raise SampleError(f"{path} has columns without a name, or two of one name. {_FIX}")
    return names


def _row(columns: list[str], cells: list[str]) -> Any:
    """The row of `cells`, empty ones as None; a `Refused` if they are more or fewer than the columns."""
    if len(cells) != len(columns):
        return Refused(f"it has {len(cells)} cells and the table {len(columns)} columns")
    try:
        return {
            name: (written_list(cell) if name in _LISTS else cell) if cell else None
            for name, cell in zip(columns, cells, strict=True)
        }
    except Refused as problem:
        return Refused(shown(str(problem), 200))


SOURCE = Source(
    what="a .csv or .tsv file",
    row="row",
    order=14,
    takes=_takes,
    name=lambda data: Path(data).name,
    folder=lambda data: Path(data).parent,
    rows=_rows,
)
