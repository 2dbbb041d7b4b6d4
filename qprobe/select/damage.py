"""What a list of layers in 4-bit costs, from each layer's share of the whole damage and from its own.

To second order the KL of a set S of layers in 4-bit is 1/2 sum_{l,m in S} H_lm, H the curvature along the
layers' D. Path attribution gives half a row, path_l = 1/2 sum_m H_lm; the own damage half the diagonal,
alone_l = 1/2 H_ll. What is between them, path_l - alone_l, is how much layer l suffers from all the others.
How that falls on single pairs is not measured; it is taken to be proportional to the other's share, so that
with the share r of all path_l left in 4-bit

    KL(S) = sum_S alone_l + r sum_S (path_l - alone_l).

All layers in 4-bit give the sum of path_l. Lists are sought among those that are best for additive scores

    alone_l + 2 r (path_l - alone_l),

which is what one more layer in 4-bit costs where a share r of its interactions is there already (a row and a
column of H). With r = 0 that is the own damage, with r = 1/2 path_l.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import fsum

from qprobe.records import Inventory
from qprobe.select.plan import Plan, choose

# r at which marginal damages are taken; the best one lies near the share that the list leaves. At 0 they are
# the own damages and at 1/2 the path's, so no list by either alone is predicted to be better.
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Damage:
    """path, alone: nats per answer token by layer, for the same layers (see the module's first lines)."""

    path: Mapping[str, float]
    alone: Mapping[str, float]

    def left(self, kept: frozenset[str]) -> float:
        """The KL predicted with `kept` in 16-bit and all other layers in 4-bit; never below 0."""
        rest = [name for name in self.path if name not in kept]
        whole = fsum(self.path.values())
        share = fsum(self.path[n] for n in rest) / whole if whole > 0 else 0.0
        own = fsum(self.alone[n] for n in rest)
        others = fsum(self.path[n] - self.alone[n] for n in rest)
        return max(0.0, own + min(max(share, 0.0), 1.0) * others)

    def marginal(self, share: float) -> dict[str, float]:
        """What each layer adds to the KL where `share` of the damage is left in 4-bit."""
        return {n: self.alone[n] + 2 * share * (self.path[n] - self.alone[n]) for n in self.path}


def least_damage(inventory: Inventory, damage: Damage, limit_bytes: int, by: str) -> Plan:
    """The plan within `limit_bytes` that is predicted to leave the smallest KL.

    For each of `SHARES` the best plan by marginal damages is found exactly; of these plans, and of keeping
    nothing, the one with the smallest `Damage.left` is taken. That is no search of all lists: on small random
    tables the best one is at times a few per cent better. The score is the predicted KL that the plan saves.
    Raises BudgetError as `choose` does.
    """
    nothing = frozenset[str]()
    plans = [choose(inventory, damage.marginal(share), limit_bytes, by) for share in SHARES]
    empty = Plan((), inventory.standard_4bit_bytes, 0.0, by)
    best = min([empty, *plans], key=lambda p: (damage.left(frozenset(p.kept)), p.total_bytes))
    return replace(best, score=damage.left(nothing) - damage.left(frozenset(best.kept)))
