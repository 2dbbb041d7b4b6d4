"""The scores of a layer table: which skip-list they choose, and what KL they predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import fsum, isfinite

import pandas as pd

from qprobe.records import EXPERTS_AS_ASKED, Inventory, Scan
from qprobe.registry import measures
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import attribution_residual, check_measure, measured
from qprobe.selection.bound import SCORE, Prospect
from qprobe.selection.search.damage import Damage, least_damages, measured_damage
from qprobe.selection.search.lists import best_skiplists
from qprobe.selection.skiplist import SkipList
from qprobe.selection.verdict import is_bent

ISOLATED_KL = measures.ISOLATED_KL.score  # the column of each layer's isolated KL


@dataclass(frozen=True)
class ScoredRun:
    """A run as skip-lists are chosen from it.

    scan: its inventory has the groups that every list keeps whole. table: its layer table. is_bent: whether
    its sensitivities miss the damage, see `sensitivities_are_bent`.
    """

    scan: Scan
    table: pd.DataFrame
    is_bent: bool = False

    @property
    def inventory(self) -> Inventory:
        return self.scan.inventory

    @property
    def standard_bytes(self) -> int:
        """Bytes of standard 4-bit."""
        return self.inventory.standard_4bit_bytes

    @property
    def score(self) -> str:
        """The column that chooses where nothing is measured, unless the user says otherwise."""
        return choosing_measure(self.table, self.is_bent)


def prospect_of(run: ScoredRun) -> Prospect:
    """What is predicted of the run's lists, as `predicted_kl` does; QprobeError without sensitivities."""
    path = layer_scores(run.table, SCORE)
    damage = damage_of(run.table) or Damage(path, path)
    return Prospect(run.inventory, replace(damage, kept=_kept_experts(run.inventory)))


def skiplist_by(inventory: Inventory, table: pd.DataFrame, column: str, limit_bytes: int) -> SkipList:
    """The best skip-list within `limit_bytes` by the measured `column`.

    By sensitivity_kl each layer's isolated KL counts as well, where it was measured (see `damage_of`).
    Raises BudgetError or QprobeError as `best_skiplist` and `layer_scores` do.
    """
    (skiplist,) = skiplists_by(inventory, table, column, [limit_bytes])
    return skiplist


def skiplists_by(
    inventory: Inventory, table: pd.DataFrame, column: str, limits: Sequence[int]
) -> list[SkipList]:
    """`skiplist_by` for each limit in bytes of `limits`, in their order."""
    damage = damage_of(table) if column == SCORE else None
    if damage is None:
        return best_skiplists(inventory, layer_scores(table, column), limits, column)
    return least_damages(inventory, replace(damage, kept=_kept_experts(inventory)), limits, column)


def returns(inventory: Inventory, table: pd.DataFrame, skiplist: SkipList) -> dict[str, float]:
    """What each layer of `skiplist` is expected to spare beside the others, by the column that chose it.

    By sensitivity_kl, where isolated KL was measured, at the share of the damage that the list leaves.
    """
    damage = damage_of(table) if skiplist.by == SCORE else None
    if damage is None:
        scores = layer_scores(table, skiplist.by)
    else:
        damage = replace(damage, kept=_kept_experts(inventory))
        scores = damage.marginal(damage.share(frozenset(skiplist.kept)))
    return {name: scores[name] for name in skiplist.kept}


def _kept_experts(inventory: Inventory) -> frozenset[str]:
    """Those that stay in 16-bit though the scan measured them in 4-bit."""
    return frozenset(x.name for x in inventory.layers if x.fixed == EXPERTS_AS_ASKED)


def damage_of(table: pd.DataFrame) -> Damage | None:
    """What the table says of the damage by lists of layers; None where isolated KL was not measured."""
    if not {SCORE, ISOLATED_KL} <= set(measured(table)):
        return None
    path, isolated = layer_scores(table, SCORE), layer_scores(table, ISOLATED_KL)
    # Where isolated KL is not finite nothing is known of what lies between this layer and the others.
    return measured_damage(path, {name: isolated.get(name, share) for name, share in path.items()})


def predicted_kl(table: pd.DataFrame, kept: frozenset[str]) -> float | None:
    """The KL, nats per answer token, that `kept` in 16-bit is predicted to leave; None where not measured.

    Without isolated KL: attributions sum to the KL of standard 4-bit, and those still in 4-bit remain.
    """
    return predictor(table)(kept)


def predictor(table: pd.DataFrame) -> Callable[[frozenset[str]], float | None]:
    """`predicted_kl` for one list after the other, what they share taken from `table` once."""
    damage, column = damage_of(table), column_of(table, SCORE)
    if damage is not None:
        return damage.left
    if SCORE not in measured(table):
        return lambda kept: None
    return lambda kept: fsum(v for n, v in column.items() if isfinite(v) and n not in kept)


def default_measure(table: pd.DataFrame) -> str:
    """The column that chooses unless the user says otherwise: the measured one that predicts best."""
    found = measured(table)
    return next((c for c in measures.proposing() if c in found), measures.ACTIVATION.score)


def choosing_measure(table: pd.DataFrame, is_bent: bool) -> str:
    """`default_measure`, but isolated KL, if it was measured, where sensitivities miss the damage."""
    return ISOLATED_KL if is_bent and ISOLATED_KL in measured(table) else default_measure(table)


def sensitivities_are_bent(run: RunFolder) -> bool:
    """True if the sensitivities of `run` miss the damage by more than they may to choose a list."""
    return is_bent(attribution_residual(run))


def layer_scores(table: pd.DataFrame, by: str) -> dict[str, float]:
    """The scores of the layers by the measured column `by`; layers without a finite value are absent.

    Raises QprobeError if `by` is not measured, or in decibels.
    """
    check_measure(table, by)
    measures.check_adds_up(by)
    return {name: value for name, value in column_of(table, by).items() if isfinite(value)}


def column_of(table: pd.DataFrame, name: str) -> dict[str, float]:
    """The value of each layer in the column `name`."""
    return dict(zip(table["layer"].tolist(), table[name].tolist(), strict=True))
