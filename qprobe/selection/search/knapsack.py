"""The 0/1 knapsack, solved exactly.

Not by scipy's HiGHS (1.12): for some inputs it prints a line on stdout even when silent
(github.com/ERGO-Code/HiGHS/issues/2783), which would break every `--json`; it keeps a limit in bytes only to
a relative tolerance; and 600 layers whose scores follow their bytes took it seconds to minutes.
The search below is Pisinger's ("A minimal algorithm for the 0-1 knapsack problem", Operations Research 45,
1997, 758-767): start from the greedy solution, then decide items outwards from where it stops, keeping only
undominated partial solutions whose linear bound still beats the best solution found.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, gcd, isfinite

import numpy as np

# A solution may be missed only if it is better by less than this share: above the rounding error of summing
# doubles, and far below the precision of any score.
_GAP = 1e-12

# Beyond this many undominated partial solutions the gap grows tenfold until they fit again, which bounds the
# time and gives up exactness to within that gap. 600 layers with real shapes need a few hundred, or 70,000
# if every score is proportional to the bytes; only such scores with coprime byte counts go beyond.
_MOST_STATES = 200_000


def knapsack(costs: Sequence[int], values: Sequence[float], limit: int) -> tuple[int, ...]:
    """Ascending indices of the items with the greatest sum of `values` whose `costs` sum to at most `limit`.

    costs: >= 0, below 2**62 in sum. values: finite; items of no positive value are not chosen. The sum of
    costs is checked in Python integers and never exceeds `limit` (>= 0). Equal inputs give equal solutions.
    """
    assert len(costs) == len(values) and limit >= 0 and all(c >= 0 for c in costs), "costs and limit >= 0"
    assert all(isfinite(v) for v in values), "values must be finite"
    useful = [i for i, v in enumerate(values) if v > 0 and costs[i] <= limit]
    if sum(costs[i] for i in useful) <= limit:
        return tuple(useful)
    free = [i for i in useful if costs[i] == 0]
    paid = [i for i in useful if costs[i] > 0]
    unit = gcd(*(costs[i] for i in paid))
    chosen = _Search(
        np.array([costs[i] // unit for i in paid], dtype=np.int64),
        np.array([values[i] for i in paid], dtype=np.float64),
        limit // unit,
    ).run()
    result = tuple(sorted([*free, *(paid[i] for i in chosen)]))
    assert sum(costs[i] for i in result) <= limit, "the solution exceeds its limit"
    return result


class _Search:
    """One search; items are numbered by falling value per cost, partial solutions are rows of arrays.

    low, high: the last undecided item below and the first above the break. weight, profit: of each partial
    solution, with undecided items as greedy has them; weight ascends and profit with it. steps: for each
    decided item its number, and for each partial solution which one it came from and whether it flips the
    item. most: the most that a solution with this item flipped can be worth.
    """

    def __init__(self, costs: np.ndarray, values: np.ndarray, limit: int) -> None:
        self.order = np.lexsort((costs, -values / costs))
        self.costs, self.values, self.limit = costs[self.order], values[self.order], limit
        self.rates = self.values / self.costs
        filled = np.cumsum(self.costs)
        self.greedy = int(np.searchsorted(filled, limit, side="right"))
        self.low, self.high = self.greedy - 1, self.greedy
        self.weight = np.array([filled[self.low] if self.greedy else 0], dtype=np.int64)
        self.profit = np.array([fsum(self.values[: self.greedy].tolist())])
        self.best, self.best_flips = float(self.profit[0]), frozenset[int]()
        self.steps: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.gap = _GAP
        # A solution with an item flipped is worth at most the optimum in fractions of items, less the item's
        # reduced cost (its value against that of its weight at the break's rate): most need no branch.
        at_break = self.rates[self.greedy]
        relaxed = self.best + float(limit - self.weight[0]) * at_break
        self.most = (relaxed - np.abs(self.values - self.costs * at_break)).tolist()

    def run(self) -> list[int]:
        """The numbers, in the caller's order, of the best solution."""
        add = True
        while len(self.weight) and (self.low >= 0 or self.high < len(self.costs)):
            add = self.high < len(self.costs) and (add or self.low < 0)
            self._decide(add)
            add = not add
        chosen = self.best_flips ^ frozenset(range(self.greedy))
        return [int(self.order[i]) for i in chosen]

    def _decide(self, add: bool) -> None:
        """Branch every partial solution on the next item outwards, and drop those that cannot win."""
        item, sign = (self.high, 1) if add else (self.low, -1)
        if add:
            self.high += 1
        else:
            self.low -= 1
        if self.most[item] <= self.best * (1 + self.gap):
            return
        count = len(self.weight)
        weight = np.concatenate([self.weight, self.weight + sign * self.costs[item]])
        profit = np.concatenate([self.profit, self.profit + sign * self.values[item]])
        order = np.lexsort((-profit, weight))
        weight, profit = weight[order], profit[order]
        undominated = np.append(True, profit[1:] > np.maximum.accumulate(profit)[:-1])
        weight, profit, order = weight[undominated], profit[undominated], order[undominated]
        self.steps.append((item, order % count, order >= count))
        fitting = int(np.searchsorted(weight, self.limit, side="right"))
        if fitting and profit[fitting - 1] > self.best:
            self.best, self.best_flips = float(profit[fitting - 1]), self._flips(fitting - 1)
        alive = self._alive(weight, profit)
        self.weight, self.profit = weight[alive], profit[alive]
        _, parents, flipped = self.steps[-1]
        self.steps[-1] = (item, parents[alive], flipped[alive])

    def _alive(self, weight: np.ndarray, profit: np.ndarray) -> np.ndarray:
        """Which partial solutions may still beat the best, by the linear bound."""
        up = self.rates[self.high] if self.high < len(self.costs) else 0.0
        # Nothing left to take out: too heavy now is too heavy for good.
        down = self.rates[self.low] if self.low >= 0 else np.inf
        room = (self.limit - weight).astype(np.float64)
        bound = profit.copy()
        bound[room > 0] += room[room > 0] * up
        bound[room < 0] += room[room < 0] * down
        alive = bound > self.best * (1 + self.gap)
        while np.count_nonzero(alive) > _MOST_STATES:
            self.gap *= 10
            alive = bound > self.best * (1 + self.gap)
        return alive

    def _flips(self, row: int) -> frozenset[int]:
        """The items in which partial solution `row` of the last step differs from greedy."""
        flips = set()
        for item, parents, flipped in reversed(self.steps):
            if flipped[row]:
                flips.add(item)
            row = int(parents[row])
        return frozenset(flips)
