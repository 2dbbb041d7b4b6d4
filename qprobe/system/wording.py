"""Counts and names as sentences say them."""

from __future__ import annotations

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
