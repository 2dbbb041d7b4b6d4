"""Scores propose, measurement decides: candidate lists, their held-out KL, and the manifest of the best."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import isfinite, nan
from pathlib import Path

import pandas as pd

from qprobe.errors import BudgetError
from qprobe.formats.protocol import format_from
from qprobe.manifest.records import NEAREST, NOTHING, Compared, Manifest, Quality
from qprobe.manifest.write import write_manifest
from qprobe.measure.held_out import measure_choices, measure_nearest
from qprobe.measure.subject import Subject
from qprobe.models.catalogue import find
from qprobe.options import DEFAULT_BUDGET, Progress, ScanOptions
from qprobe.records import Sample, Scan
from qprobe.runs.store import read_scan, write_file
from qprobe.runs.table import measured, read_table
from qprobe.selection.bound import SCORE, Bound, measured_skiplist, predicted_skiplist, rounded_up
from qprobe.selection.budget import Budget, all_fit
from qprobe.selection.decide import Candidate, decide, on_common_samples
from qprobe.selection.groups import grouped_for, keeps_groups_whole
from qprobe.selection.select import (
    damage_of,
    layer_scores,
    manifest_of,
    parse_request,
    predicted_kl,
    prospect_of,
    skiplist_by,
)
from qprobe.selection.solver import SkipList, best_skiplist
from qprobe.selection.verdict import verdict
from qprobe.system.wording import counted

SCORES = ("sensitivity_kl", "activation_nmse", "weight_nmse")  # in the order of what is known of their worth
_DEFAULTS = {x.name: x.default for x in fields(ScanOptions)}
FRONTIER_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)  # of the bytes that 4-bit saves


@dataclass(frozen=True)
class Choice:
    """The manifest that was written, its verdict, and sentences on samples that could not count."""

    manifest: Manifest
    verdict: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """The run whose skip-list is chosen, and the held-out samples, in batches, that decide; maybe none."""

    subject: Subject
    folder: Path
    held_out: list[tuple[Sample, ...]]
    options: ScanOptions
    progress: Progress

    @cached_property
    def record(self) -> Scan:
        """The run's, with the groups that every list here keeps whole."""
        record = read_scan(self.folder)
        return replace(record, inventory=grouped_for(record.inventory, self.options.for_tool))

    @cached_property
    def table(self) -> pd.DataFrame:
        return read_table(self.folder)

    @property
    def standard_bytes(self) -> int:
        return self.record.inventory.standard_4bit_bytes

    @property
    def standard(self) -> SkipList:
        """Nothing kept."""
        return SkipList((), self.standard_bytes, 0.0, self.column)

    @property
    def column(self) -> str:
        """The score that chooses: the user's, or the best one measured."""
        return self.options.by or next(c for c in SCORES if c in measured(self.table))

    @property
    def command(self) -> str:
        return scan_command(self.options, self.record.model.id)

    def measure(self, skiplists: Mapping[str, SkipList]) -> dict[str, Candidate]:
        """Each skip-list as a candidate, measured on the held-out samples; what is known is not run again."""
        kept = {name: frozenset(skiplist.kept) for name, skiplist in skiplists.items()}
        frames = measure_choices(self.subject, self.folder, self.held_out, kept, self.progress)
        return {
            n: Candidate(n, kept[n], skiplist.total_bytes, frames[n]) for n, skiplist in skiplists.items()
        }

    def nearest(self) -> list[Candidate]:
        """Standard 4-bit, measured beside calibrated weights; none where they are it."""
        if not self.record.format.is_calibrated:
            return []
        fmt = format_from(self.record.format)
        frame = measure_nearest(self.subject, self.folder, self.held_out, fmt, self.progress)
        return [Candidate(NEAREST, frozenset(), self.standard_bytes, frame)]

    def write(
        self,
        skiplist: SkipList,
        budget: Budget,
        quality: Quality | None = None,
        compared: Sequence[Compared] = (),
    ) -> Manifest:
        """FOLDER/skiplist.json for `skiplist`."""
        manifest = manifest_of(self.record, self.table, skiplist, budget, self.command, quality, compared)
        write_manifest(self.folder / "skiplist.json", manifest)
        return manifest


def scan_command(asked: ScanOptions, model_id: str) -> str:
    """What a reader of the results types: every option that changes them, and no path of a folder here.

    The model has its id, the user's samples the name of their folder or file.
    """
    given: list[tuple[str, object, object]] = [  # option, value, default
        ("--images", None if asked.images is None else asked.images.resolve().name, None),
        ("--data", None if asked.data is None else asked.data.name, None),
        ("--prompt", asked.prompt, None),
        ("--samples", asked.samples, None),
        ("--seed", asked.seed, _DEFAULTS["seed"]),
        ("--batch-size", asked.batch_size, _DEFAULTS["batch_size"]),
        ("--max-new-tokens", asked.max_new_tokens, _DEFAULTS["max_new_tokens"]),
        ("--dtype", "fp16" if asked.dtype == "float16" else "bf16", "bf16"),
        ("--format", asked.format, _DEFAULTS["format"]),
        ("--budget", (asked.budget or DEFAULT_BUDGET) if asked.max_kl is None else None, None),
        ("--max-kl", asked.max_kl, None),
        ("--by", asked.by, None),
        ("--for", asked.for_tool, None),
        ("--measures", ",".join(asked.measures) if asked.measures else None, None),
        ("--nodes", asked.nodes, _DEFAULTS["nodes"]),
        ("--ablate", asked.ablate, None),
    ]
    words = [word for name, value, default in given if value != default for word in (name, str(value))]
    return shlex.join(["qprobe", "scan", "--model", model_id, *words])


def choose_list(
    subject: Subject,
    folder: Path,
    held_out: list[tuple[Sample, ...]],
    options: ScanOptions,
    progress: Progress,
) -> Choice:
    """Measure candidate lists on `held_out`, and write FOLDER/skiplist.json for the best that was asked for.

    Without a language head or held-out samples nothing can be measured, and the first score chooses.
    Also writes FOLDER/frontier.csv where KL was measured. Raises BudgetError for what no list fits.
    """
    trial = Trial(subject, folder, held_out, options, progress)
    request = parse_request(options.budget, options.max_kl, options.by, trial.standard_bytes)
    skiplists = {NOTHING: trial.standard}
    if isinstance(request, Budget):
        skiplists |= candidate_skiplists(trial, request)
    if not (subject.has_head and held_out):
        return _by_score(trial, request)
    lines = frontier_skiplists(trial)
    found = trial.measure({**skiplists, **lines})  # in one go, so that the 16-bit model runs once a batch
    write_frontier(folder, trial.table, on_common_samples([found[name] for name in lines]))
    candidates = on_common_samples([*(found[name] for name in skiplists), *trial.nearest()])
    if candidates[0].measured.empty:
        return replace(_by_score(trial, request), notes=_left_out(trial, candidates))
    if isinstance(request, Bound):
        return _within_bound(trial, request, candidates[0])
    return _within_budget(trial, request, skiplists, candidates)


def _by_score(trial: Trial, request: Budget | Bound) -> Choice:
    """The choice where nothing can be measured."""
    if isinstance(request, Bound):
        skiplist = predicted_skiplist(prospect_of(trial.record, trial.table), request)
        budget = request.budget_of(skiplist)
    else:
        skiplist, budget = next(iter(candidate_skiplists(trial, request).values())), request
    manifest = trial.write(skiplist, budget)
    return Choice(manifest, f"No KL was measured; the list is chosen by {skiplist.by} alone.")


def _within_budget(
    trial: Trial, budget: Budget, skiplists: Mapping[str, SkipList], candidates: list[Candidate]
) -> Choice:
    """The one of `candidates` (of `skiplists`, nothing kept first) that measured best, see `decide`."""
    lists, nearest = _apart(candidates)
    decision = decide(lists[1:], lists[0])
    chosen = decision.chosen
    manifest = _write(trial, skiplists[chosen.name], budget, candidates, chosen)
    said = verdict(lists[0], chosen, trial.standard_bytes, nearest=nearest)
    is_tied = any(c.kept != chosen.kept for c in (decision.best, *decision.tied))
    tie = (decision.why,) if is_tied else ()
    roomy = all_fit(budget, trial.record.inventory)
    notes = (*tie, *([roomy] if roomy else []), *_no_better(chosen, nearest), *_left_out(trial, candidates))
    return Choice(manifest, said, notes)


def _apart(candidates: Sequence[Candidate]) -> tuple[list[Candidate], Candidate | None]:
    """(lists, standard 4-bit beside calibrated weights): the latter is named `NEAREST` and never chosen."""
    nearest = [c for c in candidates if c.name == NEAREST]
    return [c for c in candidates if c.name != NEAREST], nearest[0] if nearest else None


def _no_better(chosen: Candidate, nearest: Candidate | None) -> tuple[str, ...]:
    """A note where what was chosen of calibrated weights did not measure better than standard 4-bit."""
    if nearest is None or chosen.kl < nearest.kl:
        return ()
    return (
        f"Calibration does not pay here: on the held-out samples the choice leaves a KL of {chosen.kl:.3g}, "
        f"and rounding to nearest with nothing kept {nearest.kl:.3g}. Scan with --format nf4, or calibrate "
        "on more samples.",
    )


def _within_bound(trial: Trial, bound: Bound, standard: Candidate) -> Choice:
    """The list of the fewest bytes whose KL, measured on the held-out samples, is within `bound`."""

    def measure(skiplist: SkipList) -> float:
        return on_common_samples(list(trial.measure({"list": skiplist}).values()))[0].kl

    skiplists, best = {NOTHING: trial.standard}, trial.standard
    if standard.kl > bound.max_kl:
        best, tried = measured_skiplist(prospect_of(trial.record, trial.table), bound, measure)
        skiplists |= {f"list {i}": skiplist for i, skiplist in enumerate(tried, start=1)}
    candidates = on_common_samples([*trial.measure(skiplists).values(), *trial.nearest()])
    lists, nearest = _apart(candidates)
    if best is None:
        least = min(lists, key=lambda c: c.kl)
        raise BudgetError(
            f"No list short of 16-bit leaves a KL of {bound.max_kl} or less on the held-out samples: the "
            f"smallest of {len(lists)} measured is {least.kl:.3g}, with {least.total_bytes:,} bytes. "
            f"Pass --max-kl {rounded_up(least.kl)} or more, or use the 16-bit model."
        )
    chosen = next(c for c in lists if skiplists[c.name] == best)
    manifest = _write(trial, best, bound.budget_of(best), candidates, chosen)
    said = verdict(lists[0], chosen, trial.standard_bytes, bound.max_kl, nearest)
    return Choice(manifest, said, (*_no_better(chosen, nearest), *_left_out(trial, candidates)))


def _left_out(trial: Trial, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """A note on the held-out samples that no KL could be compared on."""
    known = set(candidates[0].measured["sample"])
    missing = [s.id for group in trial.held_out for s in group if s.id not in known]
    if not missing:
        return ()
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    samples = counted(len(missing) + len(known), "held-out sample")
    return (
        f"{len(missing)} of {samples} left out of the choice, since "
        f"they have no finite KL under every list: {shown}.",
    )


def _write(
    trial: Trial, skiplist: SkipList, budget: Budget, candidates: Sequence[Candidate], chosen: Candidate
) -> Manifest:
    """The manifest of `skiplist`, which is the candidate `chosen`; the first candidate is standard 4-bit or,
    of calibrated weights, the one named `NEAREST`.
    """
    lists, nearest = _apart(candidates)
    quality = Quality(len(chosen.measured), (nearest or lists[0]).kl, chosen.kl)
    compared = [
        Compared(c.name, c.total_bytes, c.kl, c.kl_se if isfinite(c.kl_se) else None, c is chosen)
        for c in candidates
    ]
    return trial.write(skiplist, budget, quality, compared)


def candidate_skiplists(trial: Trial, budget: Budget) -> dict[str, SkipList]:
    """The lists to compare by name: one for each measured score, and a published one that fits the budget.

    With `ScanOptions.by`, that score alone. Where isolated KL was measured, the list by sensitivities that
    simply add up is compared as well: small budgets of a small model may favour either. With
    `ScanOptions.for_tool` a published list that splits a group is no candidate.
    """
    by, inventory = trial.options.by, trial.record.inventory
    columns = [by] if by else [c for c in SCORES if c in measured(trial.table)]
    skiplists = {f"by {c}": skiplist_by(inventory, trial.table, c, budget.limit_bytes) for c in columns}
    if SCORE in columns and damage_of(trial.table) is not None:
        scores = layer_scores(trial.table, SCORE)
        skiplists[f"by {SCORE}, additive"] = best_skiplist(inventory, scores, budget.limit_bytes, SCORE)
    entry = find(trial.record.model.id)
    for published in entry.published if entry and not by else ():
        kept = published.kept(inventory)
        names = tuple(x.name for x in inventory.layers if x.name in kept and not x.fixed)
        total = inventory.total_bytes(frozenset(names))
        is_served = trial.options.for_tool is None or keeps_groups_whole(inventory, names)
        if names and is_served and total <= budget.limit_bytes:
            skiplists[published.author] = SkipList(names, total, nan, columns[0])
    return skiplists


def frontier_skiplists(trial: Trial) -> dict[str, SkipList]:
    """The lists of the best score at `FRONTIER_SHARES` of the bytes that 4-bit saves, by name."""
    inventory, column = trial.record.inventory, trial.column
    saved = inventory.total_bytes(frozenset(x.name for x in inventory.layers)) - inventory.standard_4bit_bytes
    limits = {share: inventory.standard_4bit_bytes + int(share * saved) for share in FRONTIER_SHARES}
    return {
        f"{share:.0%} of the bytes that 4-bit saves": skiplist_by(inventory, trial.table, column, n)
        for share, n in limits.items()
    }


def write_frontier(folder: Path, table: pd.DataFrame, points: Sequence[Candidate]) -> None:
    """FOLDER/frontier.csv: predicted and measured KL of the best score's lists at several budgets."""
    rows = [
        {
            "budget_bytes": point.total_bytes,
            "predicted_kl": predicted_kl(table, point.kept),
            "measured_kl": point.kl,
            "measured_kl_se": point.kl_se,
            "candidate": point.name,
        }
        for point in points
    ]
    write_file(folder / "frontier.csv", pd.DataFrame(rows).to_csv(index=False).encode())
