"""Where a linear belongs: its tower, what it reads, and its fused group; by the rules of its family."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qprobe.models.families import family_of
from qprobe.models.family import LANGUAGE, OTHER, PROJECTOR, VISION


def tower_of(name: str, architecture: str, has_vision: bool) -> str:
    """The tower of the linear `name`; an unmatched layer of a text-only model is "language"."""
    for tower, pattern in family_of(architecture).towers:
        if re.search(pattern, name):
            return tower
    return OTHER if has_vision else LANGUAGE


def reads_vision(name: str, architecture: str, tower: str) -> bool:
    """True if the inputs of the linear `name` are vision tokens only."""
    if tower in (VISION, PROJECTOR):
        return True
    pattern = family_of(architecture).vision_inputs
    return pattern is not None and re.search(pattern, name) is not None


def group_of(name: str, siblings: frozenset[str], architecture: str, tower: str) -> str:
    """The fused group of `name`: the joint name of its members, or `name` if it stands alone.

    siblings: names of all linears; a group counts only if every member exists.
    """
    family = family_of(architecture)
    return fused_group(name, siblings, family.fused_in.get(tower, family.fused))


def fused_group(name: str, siblings: frozenset[str], fused: Iterable[tuple[str, ...]]) -> str:
    """`group_of` by the groups `fused`, each of last parts of names."""
    parent, _, leaf = name.rpartition(".")
    for members in fused:
        if leaf in members and all(f"{parent}.{m}" in siblings for m in members):
            return f"{parent}.{{{','.join(members)}}}"
    return name
