"""A file of JSON objects over several lines each, or one object whose arrays hold the rows of splits.

That is what other tools write: pretty printers, and `{"version": ..., "data": [...]}`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qprobe.data.reasons import Refused
from qprobe.data.rows import OPENING
from qprobe.data.source import Rows, Source, is_split, only_split, refuse_split
from qprobe.data.sources.json_array import FIX, elements, first_lines, text_of
from qprobe.data.sources.json_lines import row_of
from qprobe.errors import SampleError

_HOLDERS = ("data", "rows", "examples", "instances", "items", "samples", "dataset", "records")
"""What the one array of rows is called where it is no split."""
_SPACE = re.compile(r"[ \t\r\n]*")
_PUNCTUATION = re.compile(r"[ \t\r\n]*([,:}]?)[ \t\r\n]*")

Span = tuple[int, int]


def _takes(data: Any) -> bool:
    """Whether objects end further down than they begin, or the one object of a file holds arrays of rows."""
    lines = first_lines(data)
    if not lines or not lines[0].startswith(b"{"):
        return False
    if len(lines) == 1:
        return bool(_arrays(lines[0].decode("utf-8", "replace")))
    goes_on = not lines[0].endswith((b"}", b"},")) and isinstance(row_of(lines[0]), Refused)
    return goes_on and not isinstance(row_of(lines[1]), dict)


def _rows(data: Any, split: str | None) -> Rows:
    path = Path(data)
    text = text_of(path)
    spans = list(_values(text, path))
    arrays = _arrays(text[slice(*spans[0])]) if len(spans) == 1 else {}
    if not arrays:
        refuse_split(split, path.name)
        yield from enumerate((row_of(text[a:b].encode("utf-8")) for a, b in spans), start=1)
        return
    strange = [x for x in arrays if not is_split(x) and (x not in _HOLDERS or len(arrays) > 1)]
    if strange:
        raise SampleError(
            f"{path} is one JSON object with the arrays {', '.join(arrays)}, and only those of splits, or "
            f"one called data, are read as rows. Make one array of rows of them. {FIX}"
        )
    chosen = only_split(list(arrays), split, path.name)
    yield from elements(text, spans[0][0] + arrays[chosen], path)


def _values(text: str, path: Path) -> list[Span]:
    """Where each value of a file begins and ends; nothing but white space is between them."""
    decoder = json.JSONDecoder()
    spans: list[Span] = []
    at = _end(_SPACE, text, 0)
    while at < len(text):
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise SampleError(
                f"{path} does not hold complete JSON objects (object {len(spans) + 1}: {why}). {FIX}"
            ) from None
        spans.append((at, end))
        at = _end(_SPACE, text, end)
    return spans


def _arrays(text: str) -> dict[str, int]:
    """Names of arrays of objects in the object `text`, and where they begin; none if it is a row itself."""
    decoder = json.JSONDecoder()
    found: dict[str, int] = {}
    at = _end(_SPACE, text, 0) + 1
    try:
        while True:
            key, end = decoder.raw_decode(text, _end(_PUNCTUATION, text, at))
            if not isinstance(key, str) or key in OPENING:
                return {}
            start = _end(_PUNCTUATION, text, end)
            value, at = decoder.raw_decode(text, start)
            is_holder = is_split(key) or key in _HOLDERS
            if isinstance(value, list) and all(isinstance(x, dict) for x in value) and (value or is_holder):
                found[key] = start
    except (ValueError, RecursionError):
        pass  # behind the last member
    return found if any(is_split(x) or x in _HOLDERS for x in found) else {}


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()


SOURCE = Source(
    what="a .json file with an object of arrays",
    row="row",
    order=25,
    takes=_takes,
    name=lambda data: Path(data).name,
    folder=lambda data: Path(data).parent,
    rows=_rows,
)
