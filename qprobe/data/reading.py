"""The one reader of scan, compare and finetune: a source -> conversations; each bad row is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qprobe.data.conversation import Conversation, Conversations, Skipped
from qprobe.data.pictures import Pictures
from qprobe.data.reasons import Refused, shown
from qprobe.data.rows import parse_row
from qprobe.data.source import source_of
from qprobe.errors import SampleError
from qprobe.options import BadData, Progress, no_progress
from qprobe.system.wording import counted, named

SHARE, AT_LEAST = 0.1, 10
"""More than this share of the rows and at least so many left out is an error: a list or an adapter would be
made of other data than was meant."""
FORMS = (
    'A row has "messages", "conversations", or "prompt" and, where it is known, "answer"; "image" or '
    '"images" where '
    "it shows any. Rows of text alone are fine."
)
SHOWN = 5  # skipped rows that an error spells out


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    split: of a source that has several. downloads: whether addresses of images are fetched. prompt: what is
    asked where a row has an image and no question; None leaves such a row out.
    """

    split: str | None = None
    downloads: bool = False
    prompt: str | None = None


def read_conversations(
    data: Any, how: Reading = Reading(), limit: int | None = None, progress: Progress = no_progress
) -> Conversations:
    """The conversations of a source, at most `limit`; whatever is no conversation is skipped and named.

    data: a .jsonl or .json file, a .parquet file or a folder of them, a folder of `datasets.save_to_disk`,
    the id of a data set of the hub, or rows in memory. Paths of images are relative to its folder. Every
    image is decoded once, as a check. Raises SampleError if the source cannot be read or has no row.
    """
    source = source_of(data)
    pictures = Pictures(source.folder(data), how.downloads)
    good: list[Conversation] = []
    skipped: list[Skipped] = []
    unused: set[str] = set()
    name = source.name(data)
    for number, row in source.rows(data, how.split):
        if isinstance(row, Refused):
            skipped.append(Skipped(number, str(row)))
        else:
            try:
                parsed = parse_row(row, pictures, how.prompt)
                found = Conversation(number, parsed.name or f"{Path(name).stem}-{number}", parsed.turns)
                for image in found.images:
                    pictures.check(image)
                good.append(found)
                unused |= parsed.unused
            except Refused as problem:
                skipped.append(Skipped(number, str(problem)))
        progress("read data", number, number)
        if limit is not None and len(good) >= limit:
            break
    told_apart, repeated = _told_apart(good, source.row)
    notes = (*repeated, *_unused_note(unused), *pictures.notes())
    return Conversations(name, source.row, told_apart, tuple(skipped), tuple(f"{name}: {x}" for x in notes))


def check_left_out(found: Conversations, bad_data: BadData, doing: str) -> None:
    """Raises SampleError as `check_counts` does, of conversations."""
    check_counts(found.name, found.row, len(found.good), found.sentences(), bad_data, doing, FORMS)


def check_counts(
    name: str, row: str, good: int, sentences: Sequence[str], bad_data: BadData, doing: str, forms: str
) -> None:
    """Raises SampleError if none is left, or, where --bad-data refuses it, too many were left out.

    good: how many are left; sentences: one per row that was left out. doing: their purpose ("train on").
    forms: what can be used, in a sentence.
    """
    more = (f"And {len(sentences) - SHOWN} more.",) if len(sentences) > SHOWN else ()
    told = " ".join((*sentences[:SHOWN], *more))
    if not good:
        raise SampleError(f"No {row} of {name} is left to {doing}. {told} {forms}")
    if (
        bad_data == "refuse"
        and len(sentences) >= AT_LEAST
        and len(sentences) > SHARE * (good + len(sentences))
    ):
        raise SampleError(
            f"{len(sentences)} of {counted(good + len(sentences), row)} of {name} cannot be used to {doing}, "
            f"more than {SHARE:.0%}. {told} Fix them, or pass --bad-data skip to go on without them."
        )


def _told_apart(good: list[Conversation], row: str) -> tuple[tuple[Conversation, ...], tuple[str, ...]]:
    """(conversations with a name of their own each, a note on those whose id was taken)."""
    rows: dict[str, int] = {}  # of each name
    kept, repeated = [], []
    for one in good:
        fresh = one.name
        while fresh in rows:
            fresh += f" ({row} {one.row})"
        if fresh != one.name:
            before = f"{shown(one.name)!r} of {row} {rows[one.name]}"
            repeated.append(f"{before} is called {shown(fresh)!r} in {row} {one.row}")
        rows[fresh] = one.row
        kept.append(replace(one, name=fresh))
    if not repeated:
        return tuple(kept), ()
    return tuple(kept), (f"{counted(len(repeated), row)} with the id of an earlier one: {named(repeated)}.",)


def _unused_note(unused: set[str]) -> tuple[str, ...]:
    return (f"not used are the fields {', '.join(sorted(unused))}.",) if unused else ()
