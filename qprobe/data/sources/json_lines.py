"""JSON Lines: one object per line."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any, BinaryIO

from qprobe.data.reasons import Refused, shown
from qprobe.data.source import SPREADSHEETS, Rows, Source, refuse_split
from qprobe.errors import SampleError
from qprobe.system.decoding import strict_json
from qprobe.system.packed import unpacked

LONGEST_LINE = 2**28  # bytes: an image of 190 MB in base64, in a line that has to be held
FIX = "Pass a .jsonl file to --data."
_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def row_of(line: bytes) -> Any:
    """The JSON value of a line, or a `Refused` that says why there is none."""
    try:
        return strict_json(line)
    except UnicodeDecodeError as error:
        return Refused(f"it is not UTF-8 (byte {error.start + 1}); save it as UTF-8")
    except ValueError as error:
        return Refused(f"it is not a complete JSON object ({shown(str(error), 160)})")


def _rows(data: Any, split: str | None) -> Rows:
    path = Path(data)
    refuse_split(split, path.name)
    with unpacked(path, SampleError, FIX) as file:
        number, begun = 0, False
        for line in iter(lambda: file.readline(LONGEST_LINE + 1), b""):
            number += 1
            if number == 1:
                line = _without_mark(line, path)
            if len(line) > LONGEST_LINE:
                _skip_line(file)
                yield number, Refused(f"it is longer than {LONGEST_LINE // 2**20:,} MiB")
            elif line.strip():
                yield number, row_of(line)
                begun = True
    if not begun:
        raise SampleError(f"{path} is empty. Each line is a JSON object with a prompt or a conversation.")


def _without_mark(line: bytes, path: Path) -> bytes:
    if line.startswith(_BOMS):
        raise SampleError(f"{path} is UTF-16, which JSON Lines are not. Save it as UTF-8.")
    return line.removeprefix(codecs.BOM_UTF8)  # which some editors put in front


def _skip_line(file: BinaryIO) -> None:
    while (more := file.readline(LONGEST_LINE)) and not more.endswith(b"\n"):
        pass


def _takes(data: Any) -> bool:
    if not isinstance(data, str | Path) or Path(data).suffix.lower() in SPREADSHEETS:
        return False
    return Path(data).exists() and not Path(data).is_dir()


SOURCE = Source(
    what="a .jsonl file",
    row="line",
    order=90,  # whatever file no other source takes
    takes=_takes,
    name=lambda data: Path(data).name,
    folder=lambda data: Path(data).parent,
    rows=_rows,
)
