"""A file that holds one JSON array of objects, as LLaVA's data comes, whatever its name."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from qprobe.data.reasons import Refused
from qprobe.data.source import Rows, Source, refuse_split
from qprobe.data.sources.json_lines import LONGEST_LINE, row_of
from qprobe.errors import SampleError
from qprobe.system.packed import read_unpacked, unpacked

LARGEST = 2**32  # bytes; the text of the file is held as a whole
FIX = "Pass a .json or .jsonl file to --data."
_BETWEEN = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")


def _takes(data: Any) -> bool:
    """Whether a file is no JSON Lines: its first line opens an array that ends further down.

    An array that is alone in a line with other lines below it is a bad row of JSON Lines.
    """
    lines = first_lines(data)
    if not lines or not lines[0].startswith(b"["):
        return False
    return len(lines) == 1 or isinstance(row_of(lines[0]), Refused)


def first_lines(data: Any) -> list[bytes]:
    """The first two lines of a file that hold something; none if `data` names no file of JSON."""
    if not isinstance(data, str | Path) or not Path(data).is_file():
        return []
    with unpacked(Path(data), SampleError, FIX) as file:
        if file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] not in (b"[", b"{"):
            return []
        file.seek(0)
        lines = (
            line.removeprefix(codecs.BOM_UTF8).strip()
            for line in iter(lambda: file.readline(LONGEST_LINE), b"")
        )
        return [line for line, _ in zip(filter(None, lines), range(2), strict=False)]


def text_of(path: Path) -> str:
    """The text of a file of JSON. Raises SampleError if it is not UTF-8, or too large to be held."""
    content = read_unpacked(path, SampleError, FIX, LARGEST).removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1}"
        raise SampleError(f"{path} is not UTF-8 ({where}). Save it as UTF-8.") from None


def _rows(data: Any, split: str | None) -> Rows:
    path = Path(data)
    refuse_split(split, path.name)
    text = text_of(path)
    yield from elements(text, text.index("["), path)


def elements(text: str, start: int, path: Path) -> Rows:
    """Each element of the array at `start` by itself, so that a bad one costs that row alone.

    A loose reader finds where it ends. Raises SampleError if the array is not complete or empty.
    """
    decoder = json.JSONDecoder()
    at = start + 1
    number = 0
    while True:
        gap = _BETWEEN.match(text, at)
        assert gap is not None, "the pattern matches nothing as well"
        if text[gap.end() : gap.end() + 1] == "]" and (number == 0) >= bool(gap[1]):
            break
        if bool(gap[1]) != bool(number):
            raise SampleError(f"{path} is not a complete JSON array (behind its element {number}). {FIX}")
        number += 1
        try:
            _, at = decoder.raw_decode(text, gap.end())
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise SampleError(
                f"{path} is not a complete JSON array (element {number}: {why}). {FIX}"
            ) from None
        yield number, row_of(text[gap.end() : at].encode("utf-8"))
    if number == 0:
        raise SampleError(
            f"{path} is an empty array. Its elements are objects with a prompt or a conversation."
        )


SOURCE = Source(
    what="a .json file with an array",
    row="row",
    order=20,
    takes=_takes,
    name=lambda data: Path(data).name,
    folder=lambda data: Path(data).parent,
    rows=_rows,
)
