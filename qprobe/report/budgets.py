"""The skip-lists along the budget: what each costs, what it is expected to leave, and its manifest."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path

import numpy as np
import pandas as pd

from qprobe.manifest import Manifest
from qprobe.measure.store import choice_stage, read_units
from qprobe.records import Scan
from qprobe.select.budget import Budget
from qprobe.select.decide import ratio_se
from qprobe.select.plan import Plan, choose
from qprobe.select.selection import default_measure, held_out_quality, layer_scores, manifest_of
from qprobe.select.table import finite_answers, measured

# Of the bytes that 4-bit saves; the budgets that a scan measures on held-out samples are among them.
SHARES = (
    0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.18, 0.2, 0.25,
    0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class KL:
    """A KL in nats per answer token, its standard error over samples, and how many there were."""

    value: float
    error: float
    samples: int


@dataclass(frozen=True)
class Point:
    """One skip-list on the frontier.

    predicted: what the sensitivities say it leaves, on the calibration samples; measured: on held-out ones;
    None where they were not measured.
    """

    plan: Plan
    budget: Budget
    predicted: KL | None
    measured: KL | None


def points(folder: Path, scan: Scan, table: pd.DataFrame) -> list[Point]:
    """The exact best list by the default score at each budget of `SHARES`, each distinct list once."""
    if not {"sensitivity_kl", "activation_nmse"} & set(measured(table)):
        return []
    column = default_measure(table)
    scores, inventory = layer_scores(table, column), scan.inventory
    standard = inventory.standard_4bit_bytes
    saved = inventory.total_bytes(frozenset(x.name for x in inventory.layers)) - standard
    limits = [standard + int(share * saved) for share in SHARES]
    chosen = {
        (plan := choose(inventory, scores, limit, column)).kept: (plan, limit) for limit in limits[::-1]
    }
    attribution = Attribution(folder)
    return [
        Point(
            plan,
            Budget(str(limit), limit),
            attribution.left_by(frozenset(plan.kept)),
            measured_kl(folder, plan),
        )
        for plan, limit in sorted(chosen.values(), key=lambda item: item[1])
    ]


class Attribution:
    """The sensitivities of a run by sample: what each list is predicted to leave, with its error."""

    def __init__(self, folder: Path) -> None:
        rows = finite_answers(read_units(folder, "sensitivity"))
        self.kl = rows.pivot(index="sample", columns="layer", values="kl_sum").fillna(0.0)
        self.tokens = rows.groupby("sample")["answer_tokens"].max().reindex(self.kl.index)

    def left_by(self, kept: frozenset[str]) -> KL | None:
        """The KL attributed to every layer that is not `kept`; None where no sensitivity was measured."""
        if self.kl.empty:
            return None
        left = self.kl.loc[:, ~self.kl.columns.isin(kept)].to_numpy(np.float64).sum(axis=1).tolist()
        tokens = self.tokens.tolist()
        return KL(fsum(left) / fsum(tokens), ratio_se(left, tokens), len(left))


def measured_kl(folder: Path, plan: Plan) -> KL | None:
    """What a scan measured of this very list on held-out samples; None if it did not."""
    rows = finite_answers(read_units(folder, choice_stage(frozenset(plan.kept))))
    if rows.empty:
        return None
    kl, tokens = rows["kl_sum"].tolist(), rows["answer_tokens"].tolist()
    return KL(fsum(kl) / fsum(tokens), ratio_se(kl, tokens), len(rows))


def manifest_at(folder: Path, scan: Scan, table: pd.DataFrame, point: Point) -> Manifest:
    """The manifest of `point`, as `qprobe select RUN --budget` gives it."""
    command = shlex.join(["qprobe", "select", folder.resolve().name, "--budget", point.budget.requested])
    quality = held_out_quality(folder, point.plan)
    return manifest_of(scan, table, point.plan, point.budget, command, quality)


def reasons(scan: Scan, table: pd.DataFrame, by: str) -> tuple[list[str], list[str]]:
    """Each layer's reason in a manifest: where it is not kept, and where it is."""
    everything = tuple(x.name for x in scan.inventory.layers if not x.fixed)
    budget = Budget("", 0)

    def said(kept: Sequence[str]) -> list[str]:
        plan = Plan(tuple(kept), 0, 0.0, by)
        return [layer.reason for layer in manifest_of(scan, table, plan, budget, "").layers]

    return said(()), said(everything)
