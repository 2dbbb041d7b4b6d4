"""What is left of a skip-list without layers that only fill its limit: a knapsack takes whatever has room.

Lists that are compared on held-out samples, where the smaller of two that cannot be told apart wins: so a
layer is given back whose return cannot be told from nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum

from qprobe.records import Inventory
from qprobe.selection.search.lists import smallest_skiplist
from qprobe.selection.skiplist import SkipList

WORTH = 0.99
"""Of what a list is expected to spare, what a smaller one must: of a hundredth few measurements tell."""


def trimmed(inventory: Inventory, returns: Mapping[str, float], skiplist: SkipList) -> dict[str, SkipList]:
    """Parts of `skiplist` by name: the fewest bytes for `WORTH` of its returns, and one halfway.

    returns: of each of its layers. The other one has half of the groups back that the first gives away, those
    that return most for their bytes; none where that is the list itself or the first.
    """
    least = smallest_skiplist(inventory, returns, WORTH * fsum(returns.values()), skiplist.by)
    given_away: dict[str, list[str]] = {}
    for layer in inventory.layers:
        if layer.name in returns and layer.name not in least.kept:
            given_away.setdefault(layer.group, []).append(layer.name)

    def rate(group: str) -> float:
        names = frozenset(given_away[group])
        size = inventory.total_bytes(names) - inventory.standard_4bit_bytes
        return fsum(returns[name] for name in names) / max(1, size)

    back = sorted(given_away, key=rate, reverse=True)[: len(given_away) // 2]
    found = {"trimmed": least}
    if back:
        names = {name for group in back for name in given_away[group]}.union(least.kept)
        kept = tuple(name for name in skiplist.kept if name in names)
        score = fsum(returns[name] for name in kept)
        found["half trimmed"] = SkipList(kept, inventory.total_bytes(frozenset(kept)), score, skiplist.by)
    return found
