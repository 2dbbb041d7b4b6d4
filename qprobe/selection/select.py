"""A run folder and a budget to a manifest, in a second and without the model."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from math import fsum, isfinite
from pathlib import Path

import pandas as pd

from qprobe import __version__
from qprobe.errors import BudgetError, QprobeError
from qprobe.manifest.records import Compared, LayerChoice, MadeBy, Manifest, ManifestBudget, Quality
from qprobe.options import DEFAULT_BUDGET
from qprobe.records import Inventory, Linear, Scan
from qprobe.runs.store import NEAREST_STAGE, choice_stage, read_scan, read_units
from qprobe.runs.table import check_measure, finite_answers, measured, read_table
from qprobe.selection.bound import SCORE, Bound, Prospect, parse_bound, predicted_skiplist
from qprobe.selection.budget import Budget, parse_budget
from qprobe.selection.damage import Damage, least_damages
from qprobe.selection.groups import grouped_for
from qprobe.selection.solver import SkipList, best_skiplists, is_scored

ISOLATED_KL = "isolated_kl"  # the column of each layer's isolated KL

_FIXED_REASONS = {
    "lm_head": "lm_head stays in 16-bit",
    "tied": "tied to the embedding",
    "kept in float32 by transformers": "never converted by transformers (float32 beside fp16)",
}


def select(
    folder: Path,
    budget: str | None = None,
    by: str | None = None,
    max_kl: float | None = None,
    for_tool: str | None = None,
) -> Manifest:
    """The manifest of the best choice of layers that `budget` allows, from scan.json and layers.csv.

    budget: see `parse_budget`. by: a measured column other than decibels, which do not add up; None for
    sensitivity_kl where measured, else activation_nmse. max_kl: in place of both, the fewest bytes with a
    predicted KL of at most this. for_tool: see `qprobe.scan`. Writes nothing. quality holds what the scan
    measured on held-out samples; kl_dynamic is None unless this very choice was among its candidates.
    Raises RunError for a folder without a finished scan, BudgetError, or QprobeError for a wrong `by`.
    """
    folder = Path(folder)
    record, table = read_scan(folder), read_table(folder)
    scan = replace(record, inventory=grouped_for(record.inventory, for_tool))
    request = parse_request(budget, max_kl, by, scan.inventory.standard_4bit_bytes)
    words = ["qprobe", "select", folder.resolve().name]
    if isinstance(request, Bound):
        skiplist = predicted_skiplist(prospect_of(scan, table), request)
        limit, words = request.budget_of(skiplist), [*words, "--max-kl", str(max_kl)]
    else:
        column = by or default_measure(table)
        skiplist = skiplist_by(scan.inventory, table, column, request.limit_bytes)
        limit, words = request, [*words, "--budget", request.requested]
    words += [word for name, value in (("--by", by), ("--for", for_tool)) if value for word in (name, value)]
    command = shlex.join(words)
    return manifest_of(scan, table, skiplist, limit, command, held_out_quality(folder, scan, skiplist))


def parse_request(
    budget: str | None, max_kl: float | None, by: str | None, standard_4bit_bytes: int
) -> Budget | Bound:
    """What the skip-list is asked to be: within a budget (None for the default), or within a bound on KL.

    Raises BudgetError if both are asked for, or either makes no sense, QprobeError for a `by` that is no KL.
    """
    if max_kl is None:
        return parse_budget(DEFAULT_BUDGET if budget is None else budget, standard_4bit_bytes)
    if budget is not None:
        raise BudgetError(
            f"Both a budget ({budget}) and a bound on KL ({max_kl}) are given. Pass one of them."
        )
    if by not in (None, SCORE):
        raise QprobeError(f"{by} predicts no KL, so it cannot choose for --max-kl. Leave --by away.")
    return parse_bound(max_kl)


def prospect_of(scan: Scan, table: pd.DataFrame) -> Prospect:
    """What is predicted of the run's lists, as `predicted_kl` does; QprobeError without sensitivities."""
    path = layer_scores(table, SCORE)
    return Prospect(scan.inventory, damage_of(table) or Damage(path, path))


def skiplist_by(inventory: Inventory, table: pd.DataFrame, column: str, limit_bytes: int) -> SkipList:
    """The best skip-list within `limit_bytes` by the measured `column`.

    By sensitivity_kl each layer's isolated KL counts as well, where it was measured (see `damage_of`).
    Raises BudgetError or QprobeError as `choose` and `layer_scores` do.
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
    return least_damages(inventory, damage, limits, column)


def damage_of(table: pd.DataFrame) -> Damage | None:
    """What the table says of the damage by lists of layers; None where isolated KL was not measured."""
    if not {SCORE, ISOLATED_KL} <= set(measured(table)):
        return None
    path, isolated = layer_scores(table, SCORE), layer_scores(table, ISOLATED_KL)
    # Where isolated KL is not finite nothing is known of what lies between this layer and the others.
    return Damage(path, {name: isolated.get(name, share) for name, share in path.items()})


def predicted_kl(table: pd.DataFrame, kept: frozenset[str]) -> float | None:
    """The KL, nats per answer token, that `kept` in 16-bit is predicted to leave; None where not measured.

    Without isolated KL: attributions sum to the KL of standard 4-bit, and those still in 4-bit remain.
    """
    return predictor(table)(kept)


def predictor(table: pd.DataFrame) -> Callable[[frozenset[str]], float | None]:
    """`predicted_kl` for one list after the other, what they share taken from `table` once."""
    damage, column = damage_of(table), _column(table, SCORE)
    if damage is not None:
        return damage.left
    if SCORE not in measured(table):
        return lambda kept: None
    return lambda kept: fsum(v for n, v in column.items() if isfinite(v) and n not in kept)


def default_measure(table: pd.DataFrame) -> str:
    """The column that chooses unless the user says otherwise: the measured one that predicts best."""
    found = measured(table)
    return next(
        (c for c in ("sensitivity_kl", "activation_nmse", "weight_nmse") if c in found), "activation_nmse"
    )


def layer_scores(table: pd.DataFrame, by: str) -> dict[str, float]:
    """The scores of the layers by the measured column `by`; layers without a finite value are absent.

    Raises QprobeError if `by` is not measured, or in decibels.
    """
    check_measure(table, by)
    if by.endswith("_db"):
        raise QprobeError(
            f"{by} is in decibels, which do not add up. Choose by {by.replace('sqnr_db', 'nmse')}."
        )
    return {name: value for name, value in _column(table, by).items() if isfinite(value)}


def manifest_of(
    scan: Scan,
    table: pd.DataFrame,
    skiplist: SkipList,
    budget: Budget,
    command: str,
    quality: Quality | None = None,
    compared: Sequence[Compared] = (),
) -> Manifest:
    """The manifest that carries out `skiplist`, made now.

    table: the layer table of `scan`, which holds the column `skiplist.by`. quality: what was measured; its
    kl_predicted is filled in from the table. command: what made it. compared: the lists it was chosen among.
    """
    kept = frozenset(skiplist.kept)
    in_16bit = kept | {x.name for x in scan.inventory.layers if x.fixed}
    sensitivity = _column(table, "sensitivity_kl")
    own = _column(table, ISOLATED_KL) if skiplist.by == SCORE and ISOLATED_KL in measured(table) else {}
    reasons = _reasons(scan, skiplist, _column(table, skiplist.by), own)
    layers = tuple(
        LayerChoice(
            name=x.name,
            checkpoint_name=x.checkpoint_name,
            shape=x.shape,
            precision="bf16" if x.fixed or x.name in kept else "nf4",
            bytes=x.bytes_16bit if x.fixed or x.name in kept else x.bytes_4bit,
            sensitivity_kl=sensitivity[x.name] if isfinite(sensitivity[x.name]) else None,
            reason=reasons[x.name],
        )
        for x in scan.inventory.layers
    )
    quality = quality or Quality()
    return Manifest(
        model=scan.model,
        format=scan.format,
        budget=ManifestBudget(
            budget.requested, budget.limit_bytes, skiplist.total_bytes, scan.inventory.standard_4bit_bytes
        ),
        quality=Quality(
            quality.samples, quality.kl_standard_4bit, quality.kl_dynamic, predicted_kl(table, in_16bit)
        ),
        compared=tuple(compared),
        layers=layers,
        uncovered=scan.inventory.uncovered,
        skip_modules=tuple(x.name for x in layers if x.precision == "bf16"),
        made_by=MadeBy(__version__, command, datetime.now(UTC).isoformat(timespec="seconds")),
        codes=scan.codes,
    )


def _column(table: pd.DataFrame, name: str) -> dict[str, float]:
    return dict(zip(table["layer"].tolist(), table[name].tolist(), strict=True))


def held_out_quality(folder: Path, scan: Scan, skiplist: SkipList) -> Quality:
    """What `scan` measured on held-out samples: standard 4-bit and, if it was a candidate, this skip-list."""
    standard_stage = NEAREST_STAGE if scan.format.is_calibrated else choice_stage(frozenset())
    standard, dynamic = (
        finite_answers(read_units(folder, stage))
        for stage in (standard_stage, choice_stage(frozenset(skiplist.kept)))
    )
    return Quality(
        samples=len(standard) or None, kl_standard_4bit=_mean_kl(standard), kl_dynamic=_mean_kl(dynamic)
    )


def _mean_kl(rows: pd.DataFrame) -> float | None:
    return fsum(rows["kl_sum"].tolist()) / sum(rows["answer_tokens"].tolist()) if len(rows) else None


def kept_and_fixed(manifest: Manifest, inventory: Inventory) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(layers that `manifest` keeps beyond what standard 4-bit keeps, those it keeps as well), in order."""
    fixed = {x.name for x in inventory.layers if x.fixed}
    in_16bit = manifest.skip_modules
    return tuple(x for x in in_16bit if x not in fixed), tuple(x for x in in_16bit if x in fixed)


def _ranked(scan: Scan, values: Mapping[str, float]) -> dict[str, int]:
    """The rank of each layer with a score, from 1 for the highest."""
    scored = [x for x in scan.inventory.layers if is_scored(x, values)]
    ordered = sorted(scored, key=lambda x: -values[x.name])
    return {x.name: rank for rank, x in enumerate(ordered, start=1)}


def _reasons(
    scan: Scan, skiplist: SkipList, values: Mapping[str, float], own: Mapping[str, float]
) -> dict[str, str]:
    """Why each layer has its precision, in words; ranks are among the layers with a score.

    own: each layer's isolated KL, where it takes part in the choice.
    """
    kept, never_ran = frozenset(skiplist.kept), frozenset(scan.unmeasured)
    ranks, isolated_ranks = _ranked(scan, values), _ranked(scan, own)
    groups: dict[str, list[str]] = {}
    for x in scan.inventory.layers:
        groups.setdefault(x.group, []).append(x.name)

    def reason(layer: Linear) -> str:
        if layer.fixed is not None:
            return _FIXED_REASONS.get(layer.fixed, f"{layer.fixed}: stays in 16-bit")
        if layer.name not in ranks or layer.name in never_ran:
            # A published list may keep what these samples never reach.
            return f"not measured on these samples, {'kept' if layer.name in kept else 'NF4'}"
        if layer.name not in kept:
            return "NF4"
        group = groups[layer.group]
        together = f", moves with its group of {len(group)}" if len(group) > 1 and kept >= {*group} else ""
        shares = f"{skiplist.by} {values[layer.name]:.2g}, rank {ranks[layer.name]} of {len(ranks)}"
        if layer.name in isolated_ranks:
            shares += f"; {ISOLATED_KL} {own[layer.name]:.2g}, rank {isolated_ranks[layer.name]}"
        return f"kept: {shares}{together}"

    return {x.name: reason(x) for x in scan.inventory.layers}
