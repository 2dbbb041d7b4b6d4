"""Groups of layers that a serving engine makes one matrix of, so that they share one precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qprobe.models.family import GENERIC
from qprobe.models.towers import fused_group
from qprobe.records import Inventory


def grouped_for(inventory: Inventory, tool: str | None) -> Inventory:
    """`inventory` with the groups of `tool`, one of FOR, so that a skip-list keeps them whole; None as it is.

    What is fixed in 16-bit is no part of any skip-list: with a fixed member a group may still be split, which
    exporting then says.
    """
    if tool is None:
        return inventory
    names = frozenset(x.name for x in inventory.layers)
    fused = GENERIC.engines[tool].fused.values()
    layers = tuple(replace(x, group=fused_group(x.name, names, fused)) for x in inventory.layers)
    return replace(inventory, layers=layers)


def keeps_groups_whole(inventory: Inventory, kept: Iterable[str]) -> bool:
    """True if no group of `inventory` has layers among `kept` and others that could be but are not."""
    names = frozenset(kept)
    found: dict[str, set[bool]] = {}
    for layer in inventory.layers:
        if layer.fixed is None:
            found.setdefault(layer.group, set()).add(layer.name in names)
    return all(len(one) == 1 for one in found.values())
