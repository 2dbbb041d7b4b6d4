"""What a data file gives: conversations, and each row that makes none, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qprobe.records import Turn, Video


@dataclass(frozen=True)
class Conversation:
    """One row: the system's turn where there is one, then user and assistant by turns.

    row: its number in the file, from 1. name: its id, or the file's name and the number.
    """

    row: int
    name: str
    turns: tuple[Turn, ...] = field(repr=False)

    @property
    def seen(self) -> tuple[bytes | Path | Video, ...]:
        """The images and videos of all turns, in their order."""
        return tuple(x for turn in self.turns for x in turn.seen)


@dataclass(frozen=True)
class Skipped:
    """A row that is left out, and why: a clause without a full stop."""

    row: int
    why: str


@dataclass(frozen=True)
class Conversations:
    """What a source holds.

    name: the source's, for messages. row: what one of its rows is called ("line"). notes: sentences on what
    was not used, and on rows and images that a rule changed. is_whole: False where further rows may follow
    that were not read.
    """

    name: str
    row: str
    good: tuple[Conversation, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    is_whole: bool = True

    def sentences(self) -> tuple[str, ...]:
        """One sentence per skipped row."""
        return tuple(f"{self.name} {self.row} {x.row}: {x.why}." for x in self.skipped)
