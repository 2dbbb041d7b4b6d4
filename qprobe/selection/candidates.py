"""Scores propose: the skip-lists that are compared on held-out samples, and those of the frontier."""

from __future__ import annotations

from math import nan

from qprobe.models.catalogue import find
from qprobe.registry.measures import proposing
from qprobe.runs.layers.table import measured
from qprobe.selection.bound import SCORE
from qprobe.selection.budget import Budget
from qprobe.selection.decide import SAME_SIZE
from qprobe.selection.request import ListRequest
from qprobe.selection.scores import (
    ScoredRun,
    damage_of,
    default_measure,
    layer_scores,
    returns,
    skiplist_by,
    skiplists_by,
)
from qprobe.selection.search.groups import keeps_groups_whole
from qprobe.selection.search.lists import best_skiplist
from qprobe.selection.skiplist import SkipList
from qprobe.selection.trimmed import trimmed

FRONTIER_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)  # of the bytes that 4-bit saves


def nothing_kept(run: ScoredRun, by: str | None) -> SkipList:
    """Standard 4-bit, of whatever format the run has. by: the score that chooses, None for the default."""
    return SkipList((), run.standard_bytes, 0.0, by or default_measure(run.table))


def candidates(
    run: ScoredRun, request: ListRequest, budget: Budget, also: str | None = None
) -> dict[str, SkipList]:
    """The lists to compare by name: one for each measured score, and a published one that fits the budget.

    With `request.by`, that score alone; also: one more score, where none was asked for. Where isolated KL was
    measured, the list by sensitivities that simply add up is compared as well: small budgets of a small model
    may favour either. The list by the score that chooses is compared with those that are left of it without
    layers of which little is expected, see `trimmed`, if they are smaller by more than `SAME_SIZE`. With
    `request.for_tool` a published list that splits a group is no candidate.
    """
    by, inventory, limit = request.by, run.inventory, budget.limit_bytes
    columns = [by] if by else [c for c in proposing() if c in measured(run.table)]
    columns += [also] if also and not by else []
    found = {f"by {c}": skiplist_by(inventory, run.table, c, limit) for c in columns}
    if SCORE in columns and damage_of(run.table) is not None:
        scores = layer_scores(run.table, SCORE)
        found[f"by {SCORE}, additive"] = best_skiplist(inventory, scores, limit, SCORE)
    choosing = by or also or default_measure(run.table)
    whole = found[f"by {choosing}"]
    for name, less in trimmed(inventory, returns(inventory, run.table, whole), whole).items():
        if whole.total_bytes - less.total_bytes > SAME_SIZE * run.standard_bytes:
            found[f"by {choosing}, {name}"] = less
    entry = find(run.scan.model.id)
    for published in entry.published if entry and not by else ():
        kept = published.kept(inventory)
        names = tuple(x.name for x in inventory.layers if x.name in kept and not x.fixed)
        total = inventory.total_bytes(frozenset(names))
        is_served = request.for_tool is None or keeps_groups_whole(inventory, names)
        if names and is_served and total <= limit:
            found[published.author] = SkipList(names, total, nan, columns[0])
    return found


def frontier(run: ScoredRun, by: str | None) -> dict[str, SkipList]:
    """The lists of the score that chooses at `FRONTIER_SHARES` of the bytes that 4-bit saves, by name."""
    inventory, column = run.inventory, by or default_measure(run.table)
    everything = inventory.total_bytes(frozenset(x.name for x in inventory.layers))
    saved = everything - run.standard_bytes
    names = [f"{share:.0%} of the bytes that 4-bit saves" for share in FRONTIER_SHARES]
    limits = [run.standard_bytes + int(share * saved) for share in FRONTIER_SHARES]
    return dict(zip(names, skiplists_by(inventory, run.table, column, limits), strict=True))
