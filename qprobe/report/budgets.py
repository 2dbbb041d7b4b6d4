"""The skip-lists along the budget: what each costs, what it is expected to leave, and its manifest."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum, sqrt

import numpy as np
import pandas as pd

from qprobe.manifest.records import Manifest, Quality
from qprobe.records import Scan
from qprobe.registry.measures import ACTIVATION, SENSITIVITY_KL
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import finite_answers, measured
from qprobe.runs.statistics import ratio_se
from qprobe.runs.units import candidate_stage
from qprobe.selection.budget import Budget
from qprobe.selection.scores import (
    ScoredRun,
    choosing_measure,
    predictor,
    sensitivities_are_bent,
    skiplists_by,
)
from qprobe.selection.skiplist import SkipList
from qprobe.selection.to_manifest import Proof, held_out_quality, manifest_of

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

    skiplist: SkipList
    budget: Budget
    predicted: KL | None
    measured: KL | None


def points(run: RunFolder, scan: Scan, table: pd.DataFrame) -> list[Point]:
    """The best list by the default score at each budget of `SHARES`, each distinct list once."""
    if not {SENSITIVITY_KL.score, ACTIVATION.score} & set(measured(table)):
        return []
    column, inventory = choosing_measure(table, sensitivities_are_bent(run)), scan.inventory
    standard = inventory.standard_4bit_bytes
    saved = inventory.total_bytes(frozenset(x.name for x in inventory.layers)) - standard
    chosen: dict[tuple[str, ...], tuple[SkipList, int]] = {}
    limits = [standard + int(share * saved) for share in SHARES]
    for skiplist, limit in zip(skiplists_by(inventory, table, column, limits), limits, strict=True):
        chosen.setdefault(skiplist.kept, (skiplist, limit))
    prediction = Prediction(run, scan, table)
    return [
        Point(
            skiplist,
            Budget(str(limit), limit),
            prediction.left_by(frozenset(skiplist.kept)),
            measured_kl(run, skiplist),
        )
        for skiplist, limit in sorted(chosen.values(), key=lambda item: item[1])
    ]


class Prediction:
    """What each list is predicted to leave, as `qprobe.selection` predicts it, with a standard error."""

    def __init__(self, run: RunFolder, scan: Scan, table: pd.DataFrame) -> None:
        self.predicted_kl = predictor(table)
        self.fixed = frozenset(x.name for x in scan.inventory.layers if x.fixed)
        rows = finite_answers(run.units(SENSITIVITY_KL.stage.name))
        self.path = rows.pivot(index="sample", columns="layer", values="kl_sum").fillna(0.0)
        self.tokens = rows.groupby("sample")["answer_tokens"].max().reindex(self.path.index)
        isolated = finite_answers(run.units("isolated"))
        own = isolated.pivot(index="sample", columns="layer", values="kl_sum")
        # Isolated KL is measured on half of the samples; without it predictions are additive in the path.
        self.own = None if own.empty else own.reindex(columns=self.path.columns).fillna(0.0)

    def left_by(self, kept: frozenset[str]) -> KL | None:
        """The KL that `kept` in 16-bit leaves; None where no sensitivity was measured.

        The KL is isolated KL and path's share of the layers left, weighted by how much of the damage is left
        (see `qprobe.selection.search.damage`); that weight is taken as known, and the two as independent.
        """
        value = self.predicted_kl(kept | self.fixed)
        if value is None or self.path.empty:
            return None
        rest = ~self.path.columns.isin(kept)
        whole = float(self.path.to_numpy(np.float64).sum())
        share = float(self.path.loc[:, rest].to_numpy(np.float64).sum()) / whole if whole > 0 else 0.0
        share = min(max(share, 0.0), 1.0)
        parts = ((self.path, 1.0),) if self.own is None else ((self.own, 1.0 - share), (self.path, share))
        variance = fsum((weight * self._error(rows.loc[:, rest])) ** 2 for rows, weight in parts if weight)
        return KL(value, sqrt(variance), len(self.path))

    def _error(self, rows: pd.DataFrame) -> float:
        """The standard error of the sum over the layers of `rows`, per answer token."""
        sums = rows.to_numpy(np.float64).sum(axis=1)
        return ratio_se(sums.tolist(), self.tokens.reindex(rows.index).tolist())


def measured_kl(run: RunFolder, skiplist: SkipList) -> KL | None:
    """What a scan measured of this very list on held-out samples; None if it did not."""
    rows = finite_answers(run.units(candidate_stage(frozenset(skiplist.kept))))
    if rows.empty:
        return None
    kl, tokens = rows["kl_sum"].tolist(), rows["answer_tokens"].tolist()
    return KL(fsum(kl) / fsum(tokens), ratio_se(kl, tokens), len(rows))


def manifest_at(run: RunFolder, scan: Scan, table: pd.DataFrame, point: Point) -> Manifest:
    """The manifest of `point`, as `qprobe select RUN --budget` gives it."""
    proof = Proof(held_out_quality(run, scan, point.skiplist))
    scored, command = ScoredRun(scan, table), command_at(run, point)
    return manifest_of(scored, point.skiplist, point.budget, command, proof)


def command_at(run: RunFolder, point: Point) -> str:
    """What makes the manifest of `point`."""
    return shlex.join(["qprobe", "select", run.path.resolve().name, "--budget", point.budget.requested])


def quality_at(point: Point, other: Quality) -> Quality:
    """The quality in the manifest of `point`; other: in that of any other point."""
    measured, predicted = (None if kl is None else kl.value for kl in (point.measured, point.predicted))
    return replace(other, kl_dynamic=measured, kl_predicted=predicted)


def reasons(scan: Scan, table: pd.DataFrame, by: str) -> tuple[list[str], list[str]]:
    """Each layer's reason in a manifest: where it is not kept, and where it is."""
    everything = tuple(x.name for x in scan.inventory.layers if not x.fixed)
    budget = Budget("", 0)

    def said(kept: Sequence[str]) -> list[str]:
        skiplist = SkipList(tuple(kept), 0, 0.0, by)
        return [layer.reason for layer in manifest_of(ScoredRun(scan, table), skiplist, budget, "").layers]

    return said(()), said(everything)
