"""Counts and names as sentences say them, and foreign text as a terminal may be shown it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_SHOWN = 3  # names that a sentence spells out


def counted(count: int, noun: str) -> str:
    """1 layer, 2 layers, 1,024 layers; for nouns whose plural ends in s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def is_or_are(count: int) -> str:
    """ "is" or "are", behind `counted`."""
    return "is" if count == 1 else "are"


def named(names: Sequence[str]) -> str:
    """The first few of `names`, and dots for the others."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def lasting(seconds: float) -> str:
    """A time in the units that tell its length: 12.3 s, 4 min 5 s, 3 h 20 min, 223 days 13 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    whole, minutes, hours = (round(seconds / unit) for unit in (1, 60, 3600))
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24:,} days {hours % 24} h"


SAID = 600  # characters of what another library said, within a message of ours


def shortened(text: str, width: int) -> str:
    """`text`, with its middle left out where it is longer than `width`."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def visible(text: str, kept: str = "") -> str:
    """`text` with an escape in the place of every character that is not seen, but for those in `kept`.

    Those are control characters, which move the cursor or colour what follows, marks that turn the direction
    of writing, line ends, and halves of characters. Spaces of every width stay.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(x) if x not in kept and is_hidden(x) else x for x in text)


def is_hidden(character: str) -> bool:
    """Whether `character` is not seen, and no space either."""
    return not character.isprintable() and unicodedata.category(character) != "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
