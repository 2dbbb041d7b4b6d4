"""The fewest bytes for a bound on KL: predicted from damages, then searched for on measured KL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import isfinite

from qprobe.errors import BudgetError
from qprobe.records import Inventory
from qprobe.registry.measures import SENSITIVITY_KL
from qprobe.selection.budget import Budget
from qprobe.selection.search.damage import Damage, fewest_bytes, least_damage
from qprobe.selection.skiplist import SkipList

SCORE = SENSITIVITY_KL.score  # the one column that predicts a KL
MOST_LISTS = 6  # measured at most; each halves what is not known, so the last step is 3 % of the range


@dataclass(frozen=True)
class Bound:
    """max_kl: nats per answer token that the model may lie from the 16-bit one, above 0."""

    max_kl: float

    @property
    def requested(self) -> str:
        """As the manifest's budget says it: "max-kl 0.01"."""
        return f"max-kl {self.max_kl}"

    def budget_of(self, skiplist: SkipList) -> Budget:
        """The budget that `skiplist` is exactly within."""
        return Budget(self.requested, skiplist.total_bytes)


def parse_bound(max_kl: float) -> Bound:
    """The bound `max_kl`; raises BudgetError unless it is a positive number."""
    if not (isfinite(max_kl) and max_kl > 0):
        raise BudgetError(
            f"A bound of {max_kl} on the KL is no positive number. Pass one, such as --max-kl 0.01."
        )
    return Bound(float(max_kl))


@dataclass(frozen=True)
class Prospect:
    """What is predicted of the lists of one model, nats per answer token (`qprobe.selection.search.damage`).

    most: predicted KL with nothing kept. least: with everything kept that is predicted to pay.
    """

    inventory: Inventory
    damage: Damage

    @property
    def most(self) -> float:
        return self.damage.left(frozenset())

    @property
    def least(self) -> float:
        return self.damage.left(frozenset(self.richest.kept))

    @cached_property
    def richest(self) -> SkipList:
        """The list that is predicted to leave the least."""
        everything = self.inventory.total_bytes(frozenset(x.name for x in self.inventory.layers))
        limit = max(everything, self.inventory.standard_4bit_bytes)
        return least_damage(self.inventory, self.damage, limit, SCORE)

    def skiplist_at(self, kl: float) -> SkipList:
        """The skip-list with the fewest bytes that is predicted to leave at most `kl` (at least `least`)."""
        return fewest_bytes(self.inventory, self.damage, kl, SCORE) or self.richest


def predicted_skiplist(prospect: Prospect, bound: Bound) -> SkipList:
    """The skip-list with the fewest bytes whose predicted KL is within `bound`.

    Raises BudgetError if there is none.
    """
    if prospect.least > bound.max_kl:
        raise BudgetError(
            f"No list is predicted to leave a KL of {bound.max_kl} or less: with every layer kept that was "
            f"measured and matters, {prospect.least:.3g} is left. "
            f"Pass --max-kl {rounded_up(prospect.least)} or more."
        )
    return prospect.skiplist_at(bound.max_kl)


def measured_skiplist(
    prospect: Prospect, bound: Bound, measure: Callable[[SkipList], float]
) -> tuple[SkipList | None, list[SkipList]]:
    """(the skip-list with the fewest bytes whose measured KL is within `bound`, all skip-lists measured).

    None if no skip-list short of 16-bit was found. Begins with the predicted skip-list, then halves the range
    of predicted KL between what was too much and what was not, with at most `MOST_LISTS` calls of `measure`;
    the last is spent on the most that can be kept if nothing was within the bound so far. To be used where
    keeping nothing measures above the bound.
    """
    everything = frozenset(x.name for x in prospect.inventory.layers if not x.fixed)
    is_16bit = everything <= frozenset(prospect.richest.kept)
    low, high = prospect.least, prospect.most
    target = bound.max_kl if low < bound.max_kl < high else (low + high) / 2
    found: dict[SkipList, float] = {}
    while len(found) < MOST_LISTS and high - low > 1e-3 * (prospect.most - prospect.least):
        is_last = len(found) == MOST_LISTS - 1
        is_hopeless = is_last and not is_16bit and min(found.values()) > bound.max_kl
        skiplist = prospect.richest if is_hopeless else prospect.skiplist_at(target)
        if everything <= frozenset(skiplist.kept):
            low = target  # 16-bit itself, which needs no measuring
        elif not skiplist.kept:
            high = target
        else:
            found[skiplist] = found[skiplist] if skiplist in found else measure(skiplist)
            low, high = (target, high) if found[skiplist] <= bound.max_kl else (low, target)
        target = (low + high) / 2
    within = [skiplist for skiplist, kl in found.items() if kl <= bound.max_kl]
    return min(within, key=lambda p: p.total_bytes, default=None), list(found)


def rounded_up(value: float) -> str:
    """`value` > 0 with three digits, never below it: a number to type after --max-kl."""
    text = f"{value:.2e}"
    mantissa, exponent = text.split("e")
    nearest = float(text)
    return f"{nearest if nearest >= value else float(f'{float(mantissa) + 0.01:.2f}e{exponent}'):g}"
