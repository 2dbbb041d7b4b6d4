"""From scores to lists of kept layers, within a share of the bytes that 4-bit saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qprobe.records import Inventory
from qprobe.selection.search.damage import Damage, least_damage
from qprobe.selection.search.lists import best_skiplist
from tests.benchmarks.rankings.cost import Cost

# Share of the saved bytes that is given back -> layers kept; None where the ranking was not tried.
Lists = Callable[[float], frozenset[str] | None]


@dataclass(frozen=True)
class Row:
    """One ranking of the table. lists: several for a ranking that is averaged over seeds.

    cost: of what the ranking measures, at one budget where it differs by budget; None where nothing is run.
    """

    name: str
    lists: tuple[Lists, ...]
    cost: Cost | None = None


@dataclass(frozen=True)
class Chooser:
    """The library's exact selection on one inventory."""

    inventory: Inventory

    def limit_bytes(self, share: float) -> int:
        """Standard 4-bit and `share` of what it saves."""
        standard = self.inventory.standard_4bit_bytes
        return standard + int(share * (self.inventory.total_bytes(self._all()) - standard))

    def kept(self, scores: Mapping[str, float], share: float) -> frozenset[str]:
        """The list with the greatest sum of `scores` within `share`."""
        return frozenset(best_skiplist(self.inventory, scores, self.limit_bytes(share), "").kept)

    def kept_with(self, scores: Mapping[str, float], share: float, forced: frozenset[str]) -> frozenset[str]:
        """The same, with the layers `forced` kept in any case."""
        above_all = 2 * sum(abs(value) for value in scores.values())
        return self.kept({**scores, **dict.fromkeys(forced, above_all)}, share)

    def lists(self, scores: Mapping[str, float]) -> Lists:
        """`kept` as a function of the share alone."""
        return lambda share: self.kept(scores, share)

    def damage_lists(self, damage: Damage) -> Lists:
        """The library's selection by isolated KL and path, as a function of the share."""
        return lambda share: frozenset(least_damage(self.inventory, damage, self.limit_bytes(share), "").kept)

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Layers that may be kept, by the group they move with."""
        found: dict[str, list[str]] = {}
        for layer in self.inventory.layers:
            if layer.fixed is None:
                found.setdefault(layer.group, []).append(layer.name)
        return {group: tuple(names) for group, names in found.items()}

    def cost_bytes(self, names: tuple[str, ...]) -> int:
        """What keeping `names` costs."""
        return self.inventory.total_bytes(frozenset(names)) - self.inventory.standard_4bit_bytes

    def _all(self) -> frozenset[str]:
        return frozenset(layer.name for layer in self.inventory.layers)


def every_layer_alone(inventory: Inventory) -> Inventory:
    """`inventory` without fused groups."""
    return replace(inventory, layers=tuple(replace(x, group=x.name) for x in inventory.layers))
