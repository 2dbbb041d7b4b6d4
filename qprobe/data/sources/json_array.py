"""A file that holds one JSON array of objects, as LLaVA's data comes, whatever its name."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from qprobe.data.reasons import Refused
from qprobe.data.source import Rows, Source, refuse_split
from qprobe.data.sources.json_lines import row_of
from qprobe.errors import SampleError
from qprobe.system.foreign import open_foreign, read_foreign

LARGEST = 2**32  # bytes; the text of the file is held as a whole
_FIX = "Pass a .json or .jsonl file to --data."
_BETWEEN = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")


def _takes(data: Any) -> bool:
    """Whether a file is no JSON Lines: its first line opens an array or an object that ends further down.

    An array that is alone in a line with other lines below it is a bad row of JSON Lines.
    """
    if not isinstance(data, str | Path) or not Path(data).is_file():
        return False
    with open_foreign(Path(data), SampleError, _FIX, None) as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        if not head.startswith(b"["):
            return head.partition(b"\n")[0].strip() == b"{"
        file.seek(0)
        lines = (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)
        first = next(line for line in lines if line)
        return not any(lines) or isinstance(row_of(first), Refused)


def _rows(data: Any, split: str | None) -> Rows:
    path = Path(data)
    refuse_split(split, path.name)
    content = read_foreign(path, SampleError, _FIX, LARGEST).removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1}"
        raise SampleError(f"{path} is not UTF-8 ({where}). Save it as UTF-8.") from None
    if not text.lstrip().startswith("["):
        raise SampleError(
            f"{path} holds a JSON object over several lines. Rows are an array, or one object per line. "
            f"{_FIX}"
        )
    yield from _elements(text, path)


def _elements(text: str, path: Path) -> Rows:
    """Each element by itself, so that a bad one costs that row alone. A loose reader finds where it ends."""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    number = 0
    while True:
        gap = _BETWEEN.match(text, at)
        assert gap is not None, "the pattern matches nothing as well"
        if text[gap.end() : gap.end() + 1] == "]" and (number == 0) >= bool(gap[1]):
            break
        if bool(gap[1]) != bool(number):
            raise SampleError(f"{path} is not a complete JSON array (behind its element {number}). {_FIX}")
        number += 1
        try:
            _, at = decoder.raw_decode(text, gap.end())
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise SampleError(
                f"{path} is not a complete JSON array (element {number}: {why}). {_FIX}"
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
