"""From a skip-list to the manifest that carries it, with the reason for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite

import pandas as pd

from qprobe import __version__
from qprobe.manifest.records import Compared, MadeBy, Manifest, ManifestBudget, ManifestLayer, Quality
from qprobe.records import Inventory, Linear, Scan
from qprobe.registry.precisions import SIXTEEN_BIT
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import ROUNDING, finite_answers, measured
from qprobe.runs.units import NEAREST_STAGE, candidate_stage
from qprobe.selection.bound import SCORE
from qprobe.selection.budget import Budget
from qprobe.selection.decide import Candidate, on_common_samples
from qprobe.selection.scores import ISOLATED_KL, ScoredRun, column_of, predicted_kl
from qprobe.selection.search.lists import is_scored
from qprobe.selection.skiplist import SkipList

_FIXED_REASONS = {
    "lm_head": "lm_head stays in 16-bit",
    "tied": "tied to the embedding",
    "its module reads the weight itself": "its module reads the weight itself, where packed codes would fail",
    "kept in float32 by transformers": "never converted by transformers (float32 beside fp16)",
}


@dataclass(frozen=True)
class Proof:
    """What was measured of a skip-list on held-out samples, and the lists that it was chosen among."""

    quality: Quality
    compared: tuple[Compared, ...] = ()


NO_PROOF = Proof(Quality())


def manifest_of(
    run: ScoredRun, skiplist: SkipList, budget: Budget, command: str, proof: Proof = NO_PROOF
) -> Manifest:
    """The manifest of `skiplist`, made now.

    run: its table holds the column `skiplist.by`. command: what made it. proof: what was measured.
    """
    scan, table = run.scan, run.table
    kept = frozenset(skiplist.kept)
    in_16bit = kept | {x.name for x in scan.inventory.layers if x.fixed}
    sensitivity = column_of(table, SCORE)
    own = column_of(table, ISOLATED_KL) if skiplist.by == SCORE and ISOLATED_KL in measured(table) else {}
    reasons = _reasons(scan, skiplist, column_of(table, skiplist.by), own)
    if scan.format.is_calibrated:
        reasons |= _partly_calibrated(table, frozenset(reasons) - in_16bit, reasons)
    layers = tuple(
        ManifestLayer(
            name=x.name,
            checkpoint_name=x.checkpoint_name,
            shape=x.shape,
            precision=SIXTEEN_BIT.name if x.name in in_16bit else scan.format.four_bit_name,
            bytes=x.bytes_16bit if x.name in in_16bit else x.bytes_4bit,
            sensitivity_kl=sensitivity[x.name] if isfinite(sensitivity[x.name]) else None,
            reason=reasons[x.name],
        )
        for x in scan.inventory.layers
    )
    return Manifest(
        model=scan.model,
        format=scan.format,
        budget=ManifestBudget(
            budget.requested, budget.limit_bytes, skiplist.total_bytes, scan.inventory.standard_4bit_bytes
        ),
        quality=replace(proof.quality, kl_predicted=predicted_kl(table, in_16bit)),
        compared=proof.compared,
        layers=layers,
        uncovered=scan.inventory.uncovered,
        skip_modules=tuple(x.name for x in layers if not x.is_four_bit),
        made_by=MadeBy(__version__, command),
        codes=scan.codes,
    )


def _partly_calibrated(
    table: pd.DataFrame, names: frozenset[str], reasons: Mapping[str, str]
) -> dict[str, str]:
    """The reasons of those of `names` of whose experts some are rounded to nearest, with how many."""
    rounding = dict(zip(table["layer"].tolist(), table[ROUNDING].tolist(), strict=True))
    return {
        name: f"{reasons[name]}; {rounding[name].partition(', ')[2]}"
        for name in names
        if rounding[name].startswith("calibrated, ")
    }


def held_out_quality(run: RunFolder, scan: Scan, skiplist: SkipList) -> Quality:
    """What `run` measured on held-out samples: standard 4-bit and, if it was a candidate, this skip-list.

    scan: of `run`, maybe with more layers fixed than it was measured with.
    """
    own = {x.name for x in run.inventory.layers if x.fixed}
    more = frozenset(x.name for x in scan.inventory.layers if x.fixed) - own
    nearest = NEAREST_STAGE if scan.format.is_calibrated and not more else candidate_stage(more)
    stages = (nearest, candidate_stage(more | frozenset(skiplist.kept)))
    measured = [Candidate(x, frozenset(), 0, finite_answers(run.units(x))) for x in stages]
    common = on_common_samples([c for c in measured if len(c.measured)])
    kl = {c.name: c.kl for c in common if len(c.measured)}
    samples = max((len(c.measured) for c in common), default=0)
    return Quality(samples or None, *(kl.get(stage) for stage in stages))


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

    own: each layer's isolated KL, where it takes part in the selection.
    """
    kept, never_ran = frozenset(skiplist.kept), frozenset(scan.unmeasured)
    ranks, isolated_ranks = _ranked(scan, values), _ranked(scan, own)
    four_bit = scan.format.precision.stored.title
    groups: dict[str, list[str]] = {}
    for x in scan.inventory.layers:
        groups.setdefault(x.group, []).append(x.name)

    def reason(layer: Linear) -> str:
        """Why this layer has its precision."""
        if layer.fixed is not None:
            return _FIXED_REASONS.get(layer.fixed, f"{layer.fixed}: stays in 16-bit")
        if layer.name not in ranks or layer.name in never_ran:
            # A published list may keep what these samples never reach.
            return f"not measured on these samples, {'kept' if layer.name in kept else four_bit}"
        if layer.name not in kept:
            return four_bit
        group = groups[layer.group]
        together = f", moves with its group of {len(group)}" if len(group) > 1 and kept >= {*group} else ""
        shares = f"{skiplist.by} {values[layer.name]:.2g}, rank {ranks[layer.name]} of {len(ranks)}"
        if layer.name in isolated_ranks:
            shares += f"; {ISOLATED_KL} {own[layer.name]:.2g}, rank {isolated_ranks[layer.name]}"
        return f"kept: {shares}{together}"

    return {x.name: reason(x) for x in scan.inventory.layers}
