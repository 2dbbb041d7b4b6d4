"""Which precision each item takes: the least damage within a limit, or the fewest bytes for a damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from qprobe.selection.search.knapsack import knapsack

# `fewest_bytes` counts damages as integers: the largest becomes 2**44, so that 2**18 of them add up below
# 2**62.
_DAMAGE_STEPS = 2**44


@dataclass(frozen=True)
class Option:
    """One precision that an item can take. size_bytes: of the whole item; damage: what it costs, any unit."""

    size_bytes: int
    damage: float


@dataclass(frozen=True)
class Item:
    """Layers that take one precision together. options: the precisions, the fewest bits first."""

    names: tuple[str, ...]
    options: tuple[Option, ...]


def least_damage(items: Sequence[Item], limit_bytes: int) -> tuple[int, ...]:
    """For each item the number of the option it takes, so that damages sum to the least within `limit_bytes`.

    Required: damages are finite and add up over items. Exactly two options per item, since the search
    (`qprobe.selection.search.knapsack`) decides yes or no for each; more options need another search behind
    this signature, a knapsack that takes one of several from each item. The first option of every item fits
    `limit_bytes` together. An item takes its second option only where that does less damage.
    """
    free, paid = _free_and_paid(items)
    base = sum(x.options[0].size_bytes for x in items) + sum(_cost(items[i]) for i in free)
    costs, values = [_cost(items[i]) for i in paid], [_gain(items[i]) for i in paid]
    better = {*free, *(paid[i] for i in knapsack(costs, values, limit_bytes - base))}
    return tuple(int(i in better) for i in range(len(items)))


def fewest_bytes(items: Sequence[Item], spared: float) -> tuple[int, ...]:
    """For each item the number of the option it takes, for the fewest bytes that spare the damage `spared`.

    spared: of the damage with the first option everywhere; at most what can be spared (`most_spared`). It may
    be missed by 2**-43 of the largest gain for each item, so that rounding never makes what a solution spares
    a target which that solution misses. Required: as of `least_damage`.
    """
    free, paid = _free_and_paid(items)
    better = set(free)
    if paid:
        # What takes its first option is a knapsack itself: the most bytes saved for the damage to be spared.
        gains = [_gain(items[i]) for i in paid]
        largest = max(gains)  # gains are divided by it first: the smallest have no 2**-44th part
        losses = [round(gain / largest * _DAMAGE_STEPS) for gain in gains]
        needed = max(0.0, spared - fsum(_gain(items[i]) for i in free)) / largest * _DAMAGE_STEPS
        spare = sum(losses) - max(0, round(needed) - len(paid))
        given_up = set(knapsack(losses, [float(_cost(items[i])) for i in paid], max(0, spare)))
        better |= {item for i, item in enumerate(paid) if i not in given_up}
    return tuple(int(i in better) for i in range(len(items)))


def most_spared(items: Sequence[Item]) -> float:
    """The damage that is spared where every item takes its better option."""
    return fsum(max(0.0, _gain(x)) for x in items)


def _free_and_paid(items: Sequence[Item]) -> tuple[list[int], list[int]]:
    """The items whose second option does less damage: those where it costs no bytes, and the others."""
    assert all(len(x.options) == 2 for x in items), "two options per item"
    worth = [i for i, x in enumerate(items) if _gain(x) > 0]
    return [i for i in worth if _cost(items[i]) <= 0], [i for i in worth if _cost(items[i]) > 0]


def _cost(item: Item) -> int:
    """What the second option takes more bytes than the first."""
    return item.options[1].size_bytes - item.options[0].size_bytes


def _gain(item: Item) -> float:
    """What the second option does less damage than the first."""
    return item.options[0].damage - item.options[1].damage
