"""The best skip-lists within a limit in bytes, and the smallest one for a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, isfinite

from qprobe.errors import BudgetError
from qprobe.records import Inventory, Linear
from qprobe.selection.budget import below_standard
from qprobe.selection.search.solver import Item, Option, fewest_bytes, least_damage, most_spared
from qprobe.selection.skiplist import SkipList


def best_skiplist(inventory: Inventory, scores: Mapping[str, float], limit_bytes: int, by: str) -> SkipList:
    """The skip-list with the greatest score whose total is at most `limit_bytes`.

    scores: by layer name. The layers of a group are kept together or not at all; a group is never kept if a
    layer of it has no score (absent or not finite) or its scores sum to 0 or less.
    Raises BudgetError if `limit_bytes` is below standard 4-bit.
    """
    (skiplist,) = best_skiplists(inventory, scores, [limit_bytes], by)
    return skiplist


def best_skiplists(
    inventory: Inventory, scores: Mapping[str, float], budgets: Sequence[int], by: str
) -> list[SkipList]:
    """`best_skiplist` for each limit in bytes of `budgets`, in their order."""
    standard = inventory.standard_4bit_bytes
    if budgets and min(budgets) < standard:
        raise BudgetError(below_standard(f"{min(budgets):,} bytes", standard))
    items = _items(inventory, scores)
    around = standard - sum(x.options[0].size_bytes for x in items)
    return [_skiplist(inventory, scores, items, least_damage(items, limit - around), by) for limit in budgets]


def smallest_skiplist(
    inventory: Inventory, scores: Mapping[str, float], target_score: float, by: str
) -> SkipList:
    """The skip-list with the fewest bytes whose score is at least `target_score`.

    The score may fall short by 2**-43 of the largest score for each layer, see `fewest_bytes`.
    Raises BudgetError if every layer together scores less.
    """
    items = _items(inventory, scores)
    most = most_spared(items)
    if target_score > most * (1 + 1e-12):
        raise BudgetError(
            f"All layers in 16-bit score {most:.6g} by {by}, less than the {target_score:.6g} asked for. "
            "Ask for less."
        )
    return _skiplist(inventory, scores, items, fewest_bytes(items, target_score), by)


def is_scored(layer: Linear, scores: Mapping[str, float]) -> bool:
    """True if `layer` can be ranked: it is not fixed and has a finite score."""
    return layer.fixed is None and isfinite(scores.get(layer.name, float("nan")))


def _items(inventory: Inventory, scores: Mapping[str, float]) -> list[Item]:
    """The groups that have scores, each in 4-bit or in 16-bit; a score is the damage that 16-bit spares."""
    groups: dict[str, list[Linear]] = {}
    for layer in inventory.layers:
        if layer.fixed is None:
            groups.setdefault(layer.group, []).append(layer)
    return [
        Item(
            tuple(x.name for x in group),
            (
                Option(sum(x.bytes_4bit for x in group), fsum(scores[x.name] for x in group)),
                Option(sum(x.bytes_16bit for x in group), 0.0),
            ),
        )
        for group in groups.values()
        if all(is_scored(x, scores) for x in group)
    ]


def _skiplist(
    inventory: Inventory, scores: Mapping[str, float], items: Sequence[Item], taken: Sequence[int], by: str
) -> SkipList:
    """The layers of the items that take their last option."""
    names = {
        n for item, i in zip(items, taken, strict=True) if i == len(item.options) - 1 for n in item.names
    }
    kept = tuple(x.name for x in inventory.layers if x.name in names)
    return SkipList(kept, inventory.total_bytes(frozenset(names)), fsum(scores[name] for name in kept), by)
