"""Scores propose, measurement decides: candidate lists, their held-out KL, and the manifest of the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, nan
from pathlib import Path

import pandas as pd

from qprobe.manifest import Manifest, Quality, write_atomic, write_manifest
from qprobe.measure.held_out import measure_choices
from qprobe.measure.store import read_scan
from qprobe.measure.subject import Subject
from qprobe.models.catalogue import find
from qprobe.options import Progress, ScanOptions
from qprobe.records import Sample
from qprobe.select.budget import Budget, parse_budget
from qprobe.select.decide import Candidate, Decision, decide
from qprobe.select.plan import Plan, choose
from qprobe.select.selection import layer_scores, manifest_of
from qprobe.select.table import measured, read_table
from qprobe.select.verdict import verdict

NOTHING = "nothing kept"
SCORES = ("sensitivity_kl", "activation_nmse", "weight_nmse")  # in the order of what is known of their worth
FRONTIER_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)  # of the bytes that 4-bit saves


@dataclass(frozen=True)
class Choice:
    """The manifest that was written, the decision behind it (None if no KL was measured), and its verdict."""

    manifest: Manifest
    decision: Decision | None
    verdict: str


def choose_list(
    subject: Subject,
    folder: Path,
    held_out: list[tuple[Sample, ...]],
    options: ScanOptions,
    progress: Progress,
) -> Choice:
    """Measure candidate lists on `held_out`, and write FOLDER/skiplist.json for the best within the budget.

    Without a language head or held-out samples nothing can be measured, and the first score chooses.
    Also writes FOLDER/frontier.csv where KL was measured. Raises BudgetError for a budget that nothing fits.
    """
    record, table = read_scan(folder), read_table(folder)
    standard_bytes = record.inventory.standard_4bit_bytes
    budget = parse_budget(options.budget, standard_bytes)
    plans = candidate_plans(folder, budget, options.by)
    command = f"qprobe scan --model {options.model} --budget {options.budget}"
    if not (subject.has_head and held_out):
        first = next(iter(plans.values()))
        manifest = manifest_of(record, table, first, budget, command)
        write_manifest(folder / "skiplist.json", manifest)
        return Choice(manifest, None, verdict(None, None, standard_bytes, f"Chosen by {first.by}."))
    lines = frontier_plans(folder, options.by)
    lists = {name: frozenset(plan.kept) for name, plan in {**plans, **lines}.items()}
    frames = measure_choices(subject, folder, held_out, {NOTHING: frozenset(), **lists}, progress)
    standard = Candidate(NOTHING, frozenset(), standard_bytes, frames[NOTHING])
    candidates = [Candidate(n, lists[n], plan.total_bytes, frames[n]) for n, plan in plans.items()]
    decision = decide(candidates, standard)
    write_frontier(
        folder, table, [Candidate(n, lists[n], p.total_bytes, frames[n]) for n, p in lines.items()]
    )
    chosen = decision.chosen
    plan = plans.get(chosen.name, Plan((), standard_bytes, 0.0, next(iter(plans.values())).by))
    quality = Quality(len(standard.measured), standard.kl, chosen.kl)
    manifest = manifest_of(record, table, plan, budget, command, quality)
    write_manifest(folder / "skiplist.json", manifest)
    write_candidates(folder, [standard, *candidates], chosen)
    return Choice(manifest, decision, verdict(standard, chosen, standard_bytes, decision.why))


def candidate_plans(folder: Path, budget: Budget, by: str | None) -> dict[str, Plan]:
    """The lists to compare by name: one for each measured score, and a published one that fits the budget.

    by: compare this score alone.
    """
    record, table = read_scan(folder), read_table(folder)
    inventory = record.inventory
    columns = [by] if by else [c for c in SCORES if c in measured(table)]
    plans = {f"by {c}": choose(inventory, layer_scores(table, c), budget.limit_bytes, c) for c in columns}
    entry = find(record.model.id)
    for published in entry.published if entry and not by else ():
        kept = published.kept(inventory)
        names = tuple(x.name for x in inventory.layers if x.name in kept and not x.fixed)
        total = inventory.total_bytes(frozenset(names))
        if names and total <= budget.limit_bytes:
            plans[published.author] = Plan(names, total, nan, columns[0])
    return plans


def frontier_plans(folder: Path, by: str | None) -> dict[str, Plan]:
    """The lists of the best score at `FRONTIER_SHARES` of the bytes that 4-bit saves, by name."""
    record, table = read_scan(folder), read_table(folder)
    inventory = record.inventory
    column = by or next(c for c in SCORES if c in measured(table))
    saved = inventory.total_bytes(frozenset(x.name for x in inventory.layers)) - inventory.standard_4bit_bytes
    limits = {share: inventory.standard_4bit_bytes + int(share * saved) for share in FRONTIER_SHARES}
    scores = layer_scores(table, column)
    return {f"frontier {share:.0%}": choose(inventory, scores, n, column) for share, n in limits.items()}


def write_frontier(folder: Path, table: pd.DataFrame, points: list[Candidate]) -> None:
    """FOLDER/frontier.csv: predicted and measured KL of the best score's lists at several budgets."""
    sensitivity: Mapping[str, float] = dict(
        zip(table["layer"], table["sensitivity_kl"].fillna(0.0), strict=True)
    )
    rows = [
        {
            "budget_bytes": point.total_bytes,
            "predicted_kl": fsum(v for name, v in sensitivity.items() if name not in point.kept),
            "measured_kl": point.kl,
            "measured_kl_se": point.kl_se,
            "candidate": point.name,
        }
        for point in points
    ]
    write_atomic(folder / "frontier.csv", pd.DataFrame(rows).to_csv(index=False).encode())


def write_candidates(folder: Path, candidates: list[Candidate], chosen: Candidate) -> None:
    """FOLDER/candidates.csv: what was compared on held-out samples, and which was taken."""
    rows = [
        {
            "candidate": c.name,
            "layers_kept": len(c.kept),
            "total_bytes": c.total_bytes,
            "measured_kl": c.kl,
            "measured_kl_se": c.kl_se,
            "chosen": c is chosen,
        }
        for c in candidates
    ]
    write_atomic(folder / "candidates.csv", pd.DataFrame(rows).to_csv(index=False).encode())
