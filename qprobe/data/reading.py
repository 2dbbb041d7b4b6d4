"""The one reader of scan, compare and finetune: a source -> conversations; each bad row is named."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprobe.data.conversation import Conversation, Conversations, Skipped
from qprobe.data.pictures import Pictures
from qprobe.data.reasons import Refused, shown
from qprobe.data.rows import Asked, parse_row
from qprobe.data.source import source_of
from qprobe.errors import LeftOutWarning, SampleError
from qprobe.options import BadData, Progress, no_progress
from qprobe.system.wording import counted, named

SHARE, AT_LEAST = 0.1, 10
"""More than this share of the rows and at least so many left out is an error: a list or an adapter would be
made of other data than was meant."""
FORMS = (
    'A row has "messages", "conversations", or "prompt" and, where it is known, "answer" (also question, '
    'instruction, output, caption, chosen, texts); "image", "images" or "video" where it shows any. Rows '
    'without an image are fine; a plain text goes into "prompt".'
)
SHOWN = 5  # skipped rows that an error spells out


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    split: of a source that has several. downloads: whether addresses of images are fetched. asked: what is
    asked where a row has an image and no question.
    """

    split: str | None = None
    downloads: bool = False
    asked: Asked = field(default_factory=Asked)


Use = Callable[[Conversation], object]
"""Takes a conversation; raises Refused, saying why, where it cannot."""
Enough = Callable[[int], bool]
"""Whether no further row is to be read, once so many are skipped."""


def read_conversations(
    data: Any,
    how: Reading = Reading(),
    use: Use = lambda _: None,
    enough: Enough = lambda _: False,
    progress: Progress = no_progress,
) -> Conversations:
    """The conversations of a source, up to `enough`; what is none, or `use` refuses, is skipped and named.

    data: a .jsonl or .json file, a .parquet file or a folder of them, a folder of `datasets.save_to_disk`,
    the id of a data set of the hub, or rows in memory. Paths of images are relative to its folder. Every
    image is decoded once, as a check. Raises SampleError if the source cannot be read or has no row.
    """
    source = source_of(data)
    pictures = Pictures(source.folder(data), how.downloads)
    good: list[Conversation] = []
    skipped: list[Skipped] = []
    unused: set[str] = set()
    rules: Counter[str] = Counter()
    is_whole = True
    names = _Names(source.row)
    name = source.name(data)
    for number, row in source.rows(data, how.split):
        try:
            parsed = parse_row(row, pictures, how.asked)
            given = parsed.name or f"{Path(name).stem}-{number}"
            found = Conversation(number, names.free(given, number), parsed.turns)
            for seen in found.seen:
                pictures.check(seen)
            use(found)
            names.take(given, found)
            good.append(found)
            unused |= parsed.unused
            rules.update(parsed.rules)
        except Refused as problem:
            skipped.append(Skipped(number, str(problem)))
        progress("read data", number, number)
        if enough(len(skipped)):
            is_whole = False
            break
    by_rule = (f"in {counted(rules[x], source.row)} {x}." for x in sorted(rules))
    notes = tuple(
        f"{name}: {x}" for x in (*names.notes(), *by_rule, *_unused_note(unused), *pictures.notes())
    )
    return Conversations(name, source.row, tuple(good), tuple(skipped), notes, is_whole)


def check_left_out(found: Conversations, bad_data: BadData, doing: str) -> None:
    """Raises SampleError as `check_counts` does, of conversations."""
    check_counts(
        found.name, found.row, len(found.good), found.sentences(), bad_data, doing, FORMS, found.is_whole
    )


def check_counts(
    name: str,
    row: str,
    good: int,
    sentences: Sequence[str],
    bad_data: BadData,
    doing: str,
    forms: str,
    is_whole: bool = True,
) -> None:
    """Raises SampleError if none is left, or, where --bad-data refuses it, too many were left out.

    good: how many are left of the rows that were read; sentences: one per row that was left out. doing: their
    purpose ("train on"). forms: what can be used, in a sentence. is_whole: False where reading stopped early.
    """
    more = (f"And {len(sentences) - SHOWN} more.",) if len(sentences) > SHOWN else ()
    told = " ".join((*sentences[:SHOWN], *more))
    too_many = are_too_many(good, len(sentences), bad_data)
    if not good:
        none = f"No {row} of {name} is left to {doing}"
        if not is_whole:
            none = f"None of the first {counted(len(sentences), row)} of {name} can be used to {doing}"
        raise SampleError(f"{none}. {told} {forms}")
    if too_many:
        raise SampleError(
            f"{share_of(len(sentences), good, row, is_whole)} of {name} cannot be used to {doing}, "
            f"more than {SHARE:.0%}. {told} Fix them, or pass --bad-data skip to go on without them."
        )


def share_of(left_out: int, good: int, row: str, is_whole: bool) -> str:
    """ "2 of 11 lines"; "2 of the first 11 lines" where reading stopped early."""
    return f"{left_out} of {'' if is_whole else 'the first '}{counted(left_out + good, row)}"


def share_sentence(left_out: Sequence[str], good: int, row: str, name: str, is_whole: bool) -> str | None:
    """The sentence on how many were left out; None if none was. Arguments as of `check_counts`."""
    return f"Left out: {share_of(len(left_out), good, row, is_whole)} of {name}." if left_out else None


def share_left_out(found: Conversations) -> str | None:
    """`share_sentence` of the rows of a source."""
    good = len({x.row for x in found.good})
    return share_sentence(found.sentences(), good, found.row, found.name, found.is_whole)


def warn_left_out(share: str | None, left_out: Sequence[str], where: str = "notes") -> None:
    """Warns of what was left out, since a Python user may never look at the result's `where`."""
    if share is not None:
        said = f"{share} The first: {left_out[0]} All are in `{where}` of the result."
        warnings.warn(said, LeftOutWarning, stacklevel=3)


def are_too_many(good: int, left_out: int, bad_data: BadData) -> bool:
    """Whether so many left out beside `good` ones are an error."""
    return bad_data == "refuse" and left_out >= AT_LEAST and left_out > SHARE * (good + left_out)


class _Names:
    """Names that tell conversations apart. row: what a row is called."""

    def __init__(self, row: str) -> None:
        self._row = row
        self._rows: dict[str, int] = {}  # of each name
        self._repeated: list[str] = []

    def free(self, name: str, number: int) -> str:
        """`name`, or one that is made of it and the row's number where it is taken."""
        while name in self._rows:
            name += f" ({self._row} {number})"
        return name

    def take(self, given: str, one: Conversation) -> None:
        """Notes that `one`, whose row gave it the name `given`, has its name."""
        if one.name != given:
            before = f"{shown(given)!r} of {self._row} {self._rows[given]}"
            self._repeated.append(f"{before} is called {shown(one.name)!r} in {self._row} {one.row}")
        self._rows[one.name] = one.row

    def notes(self) -> tuple[str, ...]:
        """A sentence on those whose name was taken, if there are any."""
        if not self._repeated:
            return ()
        count = counted(len(self._repeated), self._row)
        return (f"{count} with the id of an earlier one: {named(self._repeated)}.",)


def _unused_note(unused: set[str]) -> tuple[str, ...]:
    return (f"not used are the fields {', '.join(sorted(unused))}.",) if unused else ()
