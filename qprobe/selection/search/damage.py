"""What a list of layers in 4-bit costs, from each layer's share of the whole damage and from its own.

To second order the KL of a set S of layers in 4-bit is 1/2 sum_{l,m in S} H_lm, H the curvature along the
layers' D. Path attribution gives half a row, path_l = 1/2 sum_m H_lm; the isolated KL half the diagonal,
isolated_l = 1/2 H_ll. What is between them, path_l - isolated_l, is how much layer l suffers from all
the others.
How that falls on single pairs is not measured; it is taken to be proportional to the other's share, so that
with the share r of all path_l left in 4-bit

    KL(S) = sum_S isolated_l + r sum_S (path_l - isolated_l).

All layers in 4-bit give the sum of path_l. Lists are sought among those that are best for additive scores

    isolated_l + 2 r (path_l - isolated_l),

which is what one more layer in 4-bit costs where a share r of its interactions is there already (a row and a
column of H). With r = 0 that is the isolated KL, with r = 1/2 path_l.

Layers that were fitted to each other on the very samples that are measured, as where scales are tuned, make
up for each other there: all in 4-bit cost little, each alone as much as before. Beyond twice the path's sum
the isolated KLs then say by this formula that layers in 16-bit make it worse on average, which is true of
these samples at most. `measured_damage` lets damages add up there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum

from qprobe.records import Inventory
from qprobe.selection.search.lists import best_skiplist, best_skiplists, smallest_skiplist
from qprobe.selection.skiplist import SkipList

# r at which marginal damages are taken; the best one lies near the share that the list leaves. At 0 they are
# the isolated KLs and at 1/2 the path's, so no list by either alone is predicted to be better.
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)

# The range of sizes is halved down to this part of it before all shares are tried again.
_BYTE_STEPS = 2**12


@dataclass(frozen=True)
class Damage:
    """path, isolated: nats per answer token by layer, for the same layers (see the module's first lines).

    kept: those that are in 16-bit under every list.
    """

    path: Mapping[str, float]
    isolated: Mapping[str, float]
    kept: frozenset[str] = frozenset()

    @property
    def is_additive(self) -> bool:
        """True if nothing lies between layers, as where isolated KL was not measured."""
        return self.path == self.isolated

    def left(self, kept: frozenset[str]) -> float:
        """The KL predicted with `kept` in 16-bit as well and all other layers in 4-bit; never below 0."""
        rest = self._rest(kept)
        own = fsum(self.isolated[n] for n in rest)
        others = fsum(self.path[n] - self.isolated[n] for n in rest)
        return max(0.0, own + self.share(kept) * others)

    def share(self, kept: frozenset[str]) -> float:
        """The share of all damages that is left in 4-bit with `kept` in 16-bit as well, from 0 to 1."""
        whole = fsum(self.path.values())
        share = fsum(self.path[n] for n in self._rest(kept)) / whole if whole > 0 else 0.0
        return min(max(share, 0.0), 1.0)

    def _rest(self, kept: frozenset[str]) -> list[str]:
        return [name for name in self.path if name not in kept and name not in self.kept]

    def marginal(self, share: float) -> dict[str, float]:
        """What each layer adds to the KL where `share` of the damage is left in 4-bit."""
        return {n: self.isolated[n] + 2 * share * (self.path[n] - self.isolated[n]) for n in self.path}


def measured_damage(path: Mapping[str, float], isolated: Mapping[str, float]) -> Damage:
    """The damage that both say; as isolated KLs, scaled to the path's sum, where they exceed it twofold."""
    whole, alone = fsum(path.values()), fsum(isolated.values())
    if not 0 < 2 * whole < alone:
        return Damage(path, isolated)
    scaled = {name: value * whole / alone for name, value in isolated.items()}
    return Damage(scaled, scaled)


def least_damage(inventory: Inventory, damage: Damage, limit_bytes: int, by: str) -> SkipList:
    """The skip-list within `limit_bytes` that is predicted to leave the smallest KL.

    For each of `SHARES` the best skip-list by marginal damages is found exactly; of these, and of keeping
    nothing, the one with the smallest `Damage.left` is taken. That is no search of all lists: on small random
    tables the best one is at times a few per cent better. The score is the predicted KL that the list saves.
    Raises BudgetError as `best_skiplist` does.
    """
    (skiplist,) = least_damages(inventory, damage, [limit_bytes], by)
    return skiplist


def least_damages(inventory: Inventory, damage: Damage, limits: Sequence[int], by: str) -> list[SkipList]:
    """`least_damage` for each limit in bytes of `limits`, in their order."""
    shares = SHARES[-1:] if damage.is_additive else SHARES
    found = [best_skiplists(inventory, damage.marginal(share), limits, by) for share in shares]
    empty = SkipList((), inventory.standard_4bit_bytes, 0.0, by)
    best = [
        min([empty, *skiplists], key=lambda p: (damage.left(frozenset(p.kept)), p.total_bytes))
        for skiplists in zip(*found, strict=True)
    ]
    return [_scored(skiplist, damage) for skiplist in best]


def fewest_bytes(inventory: Inventory, damage: Damage, max_kl: float, by: str) -> SkipList | None:
    """The skip-list of the fewest bytes that is predicted to leave at most `max_kl`; None if there is none.

    Sought among the lists that `least_damage` compares: with one byte less that finds none that meets the
    bound. Where damages simply add up no list at all is smaller.
    """
    if damage.left(frozenset()) <= max_kl:
        return SkipList((), inventory.standard_4bit_bytes, 0.0, by)
    if damage.is_additive:
        return _cheapest_additive(inventory, damage, max_kl, by)
    best, limit, is_smaller = None, max(inventory.standard_4bit_bytes, _all_bytes(inventory)), True
    while is_smaller:
        is_smaller = False
        for share in SHARES:
            found = _narrowed(inventory, damage, share, max_kl, SkipList((), limit, 0.0, by))
            if found is not None:
                best, limit, is_smaller = found, found.total_bytes - 1, True
    return None if best is None else _scored(best, damage)


def _narrowed(
    inventory: Inventory, damage: Damage, share: float, max_kl: float, largest: SkipList
) -> SkipList | None:
    """A skip-list by the marginal damages at `share`, within `max_kl` and the bytes of `largest`, and small.

    None if the best one within these bytes leaves more. The size is halved down to a part of the range.
    """
    standard, scores, best = inventory.standard_4bit_bytes, damage.marginal(share), None
    low, high = standard, largest.total_bytes
    step, limit = (high - low) // _BYTE_STEPS, high
    while standard <= limit and high - low >= step:
        skiplist = best_skiplist(inventory, scores, limit, largest.by)
        if damage.left(frozenset(skiplist.kept)) <= max_kl:
            best, high = skiplist, skiplist.total_bytes - 1
        elif best is None:
            return None
        else:
            low = limit + 1
        limit = (low + high) // 2
    return best


def _cheapest_additive(inventory: Inventory, damage: Damage, max_kl: float, by: str) -> SkipList | None:
    richest = least_damage(inventory, damage, max(inventory.standard_4bit_bytes, _all_bytes(inventory)), by)
    if damage.left(frozenset(richest.kept)) > max_kl:
        return None
    spared = damage.left(frozenset()) - max_kl
    return smallest_skiplist(inventory, damage.path, min(spared, richest.score), by)


def _scored(skiplist: SkipList, damage: Damage) -> SkipList:
    """`skiplist` with the predicted KL that it saves as its score."""
    saved = damage.left(frozenset()) - damage.left(frozenset(skiplist.kept))
    return replace(skiplist, score=saved)


def _all_bytes(inventory: Inventory) -> int:
    return inventory.total_bytes(frozenset(x.name for x in inventory.layers))
