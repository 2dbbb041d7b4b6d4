"""Which layers to keep in 16-bit: the best choice under a limit in bytes, and the cheapest for a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite

from qprobe.errors import BudgetError
from qprobe.records import Inventory, Linear
from qprobe.selection.budget import below_standard
from qprobe.selection.knapsack import knapsack

# `smallest_skiplist` counts scores as integers: the largest becomes 2**44, so that 2**18 of them add up
# below 2**62.
_SCORE_STEPS = 2**44


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


@dataclass(frozen=True)
class _Item:
    """A group that moves whole. cost_bytes: what 16-bit takes more than 4-bit."""

    names: tuple[str, ...]
    cost_bytes: int
    score: float


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
    free, paid = _free_and_paid(inventory, scores)
    costs, values = [x.cost_bytes for x in paid], [x.score for x in paid]
    base = standard + sum(x.cost_bytes for x in free)
    return [
        _skiplist(inventory, scores, [*free, *(paid[i] for i in knapsack(costs, values, limit - base))], by)
        for limit in budgets
    ]


def smallest_skiplist(
    inventory: Inventory, scores: Mapping[str, float], target_score: float, by: str
) -> SkipList:
    """The skip-list with the fewest bytes whose score is at least `target_score`.

    The score may fall short by 2**-43 of the largest score for each layer, so that rounding never makes the
    score of a list a target which that list misses.
    Raises BudgetError if every layer together scores less.
    """
    free, paid = _free_and_paid(inventory, scores)
    most = fsum(x.score for x in (*free, *paid))
    if target_score > most * (1 + 1e-12):
        raise BudgetError(
            f"All layers in 16-bit score {most:.6g} by {by}, less than the {target_score:.6g} asked for. "
            "Ask for less."
        )
    if not paid:
        return _skiplist(inventory, scores, free, by)
    # What goes to 4-bit is a knapsack itself: the most bytes saved for at most the score that can be spared.
    largest = max(x.score for x in paid)  # scores are divided by it first: the smallest have no 2**-44th part
    losses = [round(x.score / largest * _SCORE_STEPS) for x in paid]
    needed = max(0.0, target_score - fsum(x.score for x in free)) / largest * _SCORE_STEPS
    spare = sum(losses) - max(0, round(needed) - len(paid))
    given_up = set(knapsack(losses, [float(x.cost_bytes) for x in paid], max(0, spare)))
    kept = [x for i, x in enumerate(paid) if i not in given_up]
    return _skiplist(inventory, scores, [*free, *kept], by)


def is_scored(layer: Linear, scores: Mapping[str, float]) -> bool:
    """True if `layer` can be ranked: it is not fixed and has a finite score."""
    return layer.fixed is None and isfinite(scores.get(layer.name, float("nan")))


def _free_and_paid(inventory: Inventory, scores: Mapping[str, float]) -> tuple[list[_Item], list[_Item]]:
    """The groups worth keeping: those too small for 4-bit to save bytes, and the others."""
    groups: dict[str, list[Linear]] = {}
    for layer in inventory.layers:
        if layer.fixed is None:
            groups.setdefault(layer.group, []).append(layer)
    items = [
        _Item(
            tuple(x.name for x in group),
            sum(x.bytes_16bit - x.bytes_4bit for x in group),
            fsum(scores[x.name] for x in group),
        )
        for group in groups.values()
        if all(is_scored(x, scores) for x in group)
    ]
    worth = [x for x in items if x.score > 0]
    return [x for x in worth if x.cost_bytes <= 0], [x for x in worth if x.cost_bytes > 0]


def _skiplist(inventory: Inventory, scores: Mapping[str, float], items: Sequence[_Item], by: str) -> SkipList:
    names = frozenset(name for item in items for name in item.names)
    kept = tuple(x.name for x in inventory.layers if x.name in names)
    return SkipList(kept, inventory.total_bytes(names), fsum(scores[name] for name in kept), by)
