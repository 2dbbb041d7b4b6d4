"""A skip-list: which layers stay in 16-bit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SkipList:
    """Which layers stay in 16-bit.

    kept: names in execution order, fixed layers (in 16-bit anyway) not among them. total_bytes: of the whole
    model. score: sum of the scores of `kept`. by: the column the scores came from.
    """

    kept: tuple[str, ...]
    total_bytes: int
    score: float
    by: str
