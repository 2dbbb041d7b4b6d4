"""A run folder and a budget to a manifest, in a second and without the model."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pandas as pd

from qprobe.errors import QprobeError
from qprobe.manifest.records import Manifest
from qprobe.options import KeptExperts
from qprobe.records import Inventory
from qprobe.runs.folder import AnyRun, RunFolder, run_folder
from qprobe.selection.bound import Bound, predicted_skiplist
from qprobe.selection.budget import Budget
from qprobe.selection.exceeded import refuse_measured_above
from qprobe.selection.request import ListRequest, parse_request
from qprobe.selection.scores import ScoredRun, prospect_of, sensitivities_are_bent, skiplist_by
from qprobe.selection.search.groups import grouped_for
from qprobe.selection.skiplist import SkipList
from qprobe.selection.to_manifest import Proof, held_out_quality, manifest_of


def select(
    run: AnyRun,
    budget: str | None = None,
    *,
    by: str | None = None,
    max_kl: float | None = None,
    for_tool: str | None = None,
    experts: KeptExperts | None = None,
) -> Manifest:
    """The manifest of the best skip-list that `budget` allows, from scan.json and layers.csv.

    budget: as of `qprobe.scan`. by: a measured column other than decibels, which do not add up; None for
    sensitivity_kl where measured, else activation_nmse; for isolated_kl where sensitivities miss the KL by
    more than 5 %. max_kl: in place of both, the fewest bytes with a predicted KL of at most this; refused
    where the run measured that list above it. for_tool: see `qprobe.scan`. experts: "16-bit" keeps fused
    weights of experts so, beside which the budget counts. Writes nothing. quality holds what the scan
    measured on held-out samples; kl_dynamic is None unless this very list was among its candidates.
    Raises RunError for a folder without a finished scan, BudgetError, or QprobeError for a wrong `by`.
    """
    folder, request = run_folder(run), parse_request(budget, max_kl, by, for_tool, experts)
    scored = scored_run(folder, request)
    skiplist, limit = asked_skiplist(scored, request)
    if isinstance(request.limit, Bound):
        refuse_measured_above(folder, scored, skiplist, request.limit)
    command = shlex.join(["qprobe", "select", folder.path.resolve().name, *request.words])
    return manifest_of(
        scored, skiplist, limit, command, Proof(held_out_quality(folder, scored.scan, skiplist))
    )


def scored_run(run: RunFolder, request: ListRequest, table: pd.DataFrame | None = None) -> ScoredRun:
    """The finished `run`, with the groups and the experts that `request` keeps.

    table: its layer table, where that is not written yet; None for the one in the folder.
    """
    record, table = run.scan, run.table if table is None else table
    inventory = grouped_for(record.inventory, request.for_tool)
    if request.experts is not None:
        _refuse_without_experts(inventory)
        inventory = inventory.with_experts_kept
        record = replace(record, format=replace(record.format, experts=request.experts))
    return ScoredRun(replace(record, inventory=inventory), table, sensitivities_are_bent(run))


def _refuse_without_experts(inventory: Inventory) -> None:
    if all(x.experts is None for x in inventory.layers):
        raise QprobeError("This model has no fused weights of experts. Leave out --experts.")


def asked_skiplist(run: ScoredRun, request: ListRequest) -> tuple[SkipList, Budget]:
    """(the best skip-list by its score alone, the budget that it is within), nothing measured."""
    if isinstance(request.limit, Bound):
        skiplist = predicted_skiplist(prospect_of(run), request.limit)
        return skiplist, request.limit.budget_of(skiplist)
    limit = request.limit.within(run.standard_bytes)
    column = request.by or run.score
    return skiplist_by(run.inventory, run.table, column, limit.limit_bytes), limit
