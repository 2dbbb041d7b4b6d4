"""Inputs made of good ones, and what a reader does with them."""

from __future__ import annotations

import faulthandler
import json
import random
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.readers import Reader, readers

CORPUS = Path(__file__).with_name("corpus")
LONGEST_SECONDS, LONGEST_MESSAGE = 5.0, 2000
HUNG_SECONDS = 60.0  # by the clock: a reader that takes longer is not waited for
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**30, 1e308, "", "x" * 9999, "\x1b[2J", "\u202e", "\ud800", "../../x",
    "/dev/zero", "=1+1", "a\nb", "(a|aa)+\\d$", "[[:alpha:]]", "{e<2}", "*", "(", [], {}, [[]], {"": {}},
    [None], "NaN",
)  # fmt: skip
TEXTS = (
    b"NaN", b"-Infinity", b"1e999", b"[" * 5000, b'{"a":' * 5000, b"\xff", b"\x00", b"\xef\xbb\xbf",
    b"9" * 5000, b"\n", b",", b'"', b"PAR1", b"\xff" * 8,
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """An input that `reader` does not explain."""

    reader: str
    data: bytes
    what: str


def tried(
    folder: Path, seconds: float, seed: int, hung: Path | None = None
) -> tuple[Mapping[str, int], list[Finding]]:
    """(inputs by reader, findings): each reader has an equal share of the time.

    hung: a folder that holds the input being read, under its reader's name. An input that takes more than
    `HUNG_SECONDS` ends the process, stays there, and stderr shows where it hung.
    """
    draw = random.Random(seed)
    counts: dict[str, int] = {}
    findings: dict[tuple[str, str], Finding] = {}
    found = readers(folder)
    for name, reader in found.items():
        end, counts[name] = time.monotonic() + seconds / len(found), 0
        while time.monotonic() < end:
            data = damaged(draw.choice(reader.seeds), draw)
            counts[name] += 1
            with watched(None if hung is None else hung / name, data):
                what = problem(reader, data)
            if what is not None:
                findings.setdefault((name, what[:40]), Finding(name, data, what))
    return counts, list(findings.values())


@contextmanager
def watched(kept: Path | None, data: bytes, limit_s: float = HUNG_SECONDS) -> Iterator[None]:
    """While open, `data` lies in `kept`; after `limit_s` the process ends with a traceback. None: neither.

    The watchdog is a thread of its own: a loop in C, which holds up signals, does not hold it up.
    """
    if kept is None:
        yield
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(data)
    faulthandler.dump_traceback_later(limit_s, exit=True, file=2)  # pytest has another stderr
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        kept.unlink()


def problem(reader: Reader, data: bytes) -> str | None:
    """What is wrong with how `reader` takes `data`; None if it is read, or explained."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            reader.read(data)
        except reader.errors as error:
            if len(str(error)) > LONGEST_MESSAGE:
                return f"a message of {len(str(error)):,} characters"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the panics of libraries in Rust are no Exception
            return f"{type(error).__name__}: {str(error)[:200]}"
    spent = time.process_time() - start
    return f"{spent:.1f} s" if spent > LONGEST_SECONDS else None


def damaged(good: bytes, draw: random.Random) -> bytes:
    """`good` with one to four changes: of its bytes, or of its values where it is JSON."""
    data = good
    for _ in range(draw.randint(1, 4)):
        data = draw.choice((_changed_values, _changed_values, _changed_bytes))(data, draw)
    return data


def _changed_values(data: bytes, draw: random.Random) -> bytes:
    head = data[:8] if data[8:9] == b"{" else b""  # of a safetensors file, whose header is JSON
    end = len(head) + int.from_bytes(head, "little") if head else len(data)
    with suppress(ValueError, RecursionError):
        value = json.loads(data[len(head) : end])
        text = json.dumps(_changed(value, draw)).encode()
        return (len(text).to_bytes(8, "little") if head else b"") + text + data[end:]
    return _changed_bytes(data, draw)


def _changed(value: Any, draw: random.Random) -> Any:
    """A copy of the JSON `value` with one place changed."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        name = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != name}
        if kind < 0.2:
            return {**value, str(draw.choice(VALUES)): draw.choice(VALUES)}
        return {**value, name: _changed(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return [*value, value[place]]
        return [_changed(x, draw) if i == place else x for i, x in enumerate(value)]
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 2**31, 2**63))
    return draw.choice(VALUES)


def _changed_bytes(data: bytes, draw: random.Random) -> bytes:
    place, more = draw.randint(0, len(data)), draw.randint(1, 8)
    match draw.randrange(5):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + draw.choice(TEXTS) + data[place:]
        case 2:
            return data[:place] + draw.randbytes(more) + data[place + more :]
        case 3:
            return data[:place] + data[place + more :]
        case _:
            return data[:place] + data[draw.randint(0, len(data)) :]
