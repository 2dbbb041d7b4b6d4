"""The selection of a scan: candidates are measured on held-out samples, and the best gets a manifest.

Where a metric is asked for, the answers of what was chosen are scored on the same samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite

from qprobe.calibration.experts.notes import experts_note
from qprobe.formats.protocol import format_from
from qprobe.inputs.answers import Batching
from qprobe.inputs.metrics import Metric
from qprobe.manifest.records import NEAREST, NOTHING, Compared, Manifest, OtherKinds
from qprobe.manifest.write import write_manifest
from qprobe.measure.held_out import measure_candidates, measure_nearest, measure_others
from qprobe.measure.kl import in_four_bit
from qprobe.measure.subject import Subject
from qprobe.options import Progress
from qprobe.records import Sample
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import attribution_residual
from qprobe.runs.scored import Scored, scored
from qprobe.runs.shards import SKIPLIST
from qprobe.runs.units import NEAREST_STAGE
from qprobe.scanning.answers import AnsweredBy, own_answers
from qprobe.scanning.process import Process
from qprobe.scanning.samples import ScanSamples
from qprobe.selection.bound import Bound
from qprobe.selection.candidates import candidates, frontier, nothing_kept
from qprobe.selection.decide import Candidate, on_common_samples
from qprobe.selection.derived.frontier import write_frontier
from qprobe.selection.outcome import Outcome, by_score, within_bound, within_budget
from qprobe.selection.request import ListRequest
from qprobe.selection.scores import ISOLATED_KL, ScoredRun
from qprobe.selection.select import scored_run
from qprobe.selection.skiplist import SkipList
from qprobe.selection.to_manifest import manifest_of
from qprobe.selection.verdict import DYNAMIC, SIXTEEN_BIT, others_verdict, residual_verdict
from qprobe.system.wording import counted

METRIC_STAGE = "metric"  # of progress, and a kind of work


@dataclass(frozen=True)
class Selection:
    """The manifest that was written, its verdict, and sentences on samples that could not count.

    kept: what it keeps in 16-bit, beyond what standard 4-bit keeps as well.
    """

    manifest: Manifest
    kept: frozenset[str]
    verdict: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeldOut:
    """The samples that decide between candidates, in batches, maybe none."""

    subject: Subject
    run: RunFolder
    groups: list[tuple[Sample, ...]]
    progress: Progress

    @property
    def has_kl(self) -> bool:
        """True if a KL can be measured on them."""
        return self.subject.readout is not None and bool(self.groups)

    def measure(self, skiplists: Mapping[str, SkipList]) -> dict[str, Candidate]:
        """Each skip-list as a candidate of the same name; what is known is not run again."""
        kept = {name: frozenset(skiplist.kept) for name, skiplist in skiplists.items()}
        frames = measure_candidates(self.subject, self.run, self.groups, kept, self.progress)
        return {n: Candidate(n, kept[n], x.total_bytes, frames[n]) for n, x in skiplists.items()}

    def nearest(self, run: ScoredRun) -> list[Candidate]:
        """Standard 4-bit, measured beside calibrated weights; none where they are it."""
        if not run.scan.format.is_calibrated:
            return []
        self.measure_nearest(range(len(self.groups)))
        return [Candidate(NEAREST, frozenset(), run.standard_bytes, self.run.units(NEAREST_STAGE))]

    def measure_nearest(self, units: Iterable[int]) -> None:
        """Measure standard 4-bit on the batches `units`, beside calibrated weights."""
        fmt = format_from(self.run.key.format)
        measure_nearest(self.subject, self.run, self.groups, fmt, units, self.progress)


@dataclass(frozen=True)
class Others:
    """Samples of another kind, in batches. data: the name of the file that they are of."""

    data: str
    groups: list[tuple[Sample, ...]]

    def measure(self, run: ScoredRun, held_out: HeldOut, skiplist: SkipList) -> list[Candidate]:
        """Standard 4-bit, nothing kept where that is another model, and `skiplist` if it keeps anything."""
        fmt = format_from(run.scan.format) if run.scan.format.is_calibrated else None
        lists = {NOTHING: nothing_kept(run, None), **({DYNAMIC: skiplist} if skiplist.kept else {})}
        kept = {name: frozenset(one.kept) for name, one in lists.items()}
        frames = measure_others(held_out.subject, held_out.run, self.groups, kept, fmt, held_out.progress)
        found = [Candidate(name, kept[name], one.total_bytes, frames[name]) for name, one in lists.items()]
        if fmt is not None:
            found.insert(0, Candidate(NEAREST, frozenset(), run.standard_bytes, frames[NEAREST_STAGE]))
        return on_common_samples(found)


def _on_others(
    run: ScoredRun, held_out: HeldOut, others: Others, skiplist: SkipList
) -> tuple[str, OtherKinds | None]:
    """(a sentence, what the manifest says) of the damage on `others`."""
    can_be = held_out.subject.readout is not None and bool(others.groups)  # none has an answer, else
    found = others.measure(run, held_out, skiplist) if can_be else []
    if not found or found[0].measured.empty:
        return f"On the samples of another kind ({others.data}) no damage could be measured.", None
    compared = tuple(
        Compared(c.name, c.total_bytes, c.kl, c.kl_se if isfinite(c.kl_se) else None, c.name == DYNAMIC)
        for c in found
    )
    told = others_verdict(others.data, found, run.scan.readout)
    return told, OtherKinds(others.data, len(found[0].measured), compared)


def choose(held_out: HeldOut, request: ListRequest, command: str, others: Others | None = None) -> Selection:
    """The selection among candidates that are measured on `held_out`; writes its manifest, RUN/skiplist.json.

    Without a language head or held-out samples nothing can be measured, and the first score chooses.
    Also writes RUN/frontier.csv where KL was measured. command: what made it, for the manifest. others: on
    which the damage of what was chosen is said as well.
    Raises BudgetError for what no list fits.
    """
    run, residual = scored_run(held_out.run, request), attribution_residual(held_out.run)
    outcome = _measured(run, held_out, request) if held_out.has_kl else by_score(run, request)
    if residual is not None:
        outcome = replace(outcome, verdict=f"{outcome.verdict} {residual_verdict(residual)}")
    if run.scan.format.is_calibrated and (note := experts_note(held_out.run)):
        outcome = replace(outcome, verdict=f"{outcome.verdict} {note}")
    manifest = manifest_of(run, outcome.skiplist, outcome.budget, command, outcome.proof)
    if others is not None:
        told, other_kinds = _on_others(run, held_out, others, outcome.skiplist)
        outcome = replace(outcome, verdict=f"{outcome.verdict} {told}")
        manifest = replace(manifest, other_kinds=other_kinds)
    write_manifest(held_out.run.path / SKIPLIST, manifest)
    held_out.run.files.record(SKIPLIST, len(manifest.layers))
    return Selection(manifest, frozenset(outcome.skiplist.kept), outcome.verdict, outcome.notes)


def proposed(run: ScoredRun, request: ListRequest) -> tuple[dict[str, SkipList], dict[str, SkipList]]:
    """(the lists to choose from, nothing kept first, those of the frontier), by name.

    Where sensitivities do not add up, the lists of the frontier are by isolated KL, and one more candidate.
    """
    limit = request.limit
    own = ISOLATED_KL if run.is_bent and run.score == ISOLATED_KL else None
    skiplists = {NOTHING: nothing_kept(run, request.by)}
    if not isinstance(limit, Bound):
        skiplists |= candidates(run, request, limit.within(run.standard_bytes), own)
    return skiplists, frontier(run, request.by or own)


def _measured(run: ScoredRun, held_out: HeldOut, request: ListRequest) -> Outcome:
    """The outcome of measuring; of the first score alone where no sample has a finite KL under every list."""
    limit = request.limit
    skiplists, lines = proposed(run, request)
    # In one go, so that the 16-bit model runs once per batch.
    found = held_out.measure({**skiplists, **lines})
    write_frontier(held_out.run, run.table, on_common_samples([found[name] for name in lines]))
    compared = on_common_samples([*(found[name] for name in skiplists), *held_out.nearest(run)])
    if compared[0].measured.empty:
        outcome = replace(by_score(run, request), candidates=tuple(compared))
    elif isinstance(limit, Bound):
        outcome = within_bound(run, limit, compared[0], held_out)
    else:
        outcome = within_budget(run, limit.within(run.standard_bytes), skiplists, compared)
    return replace(outcome, notes=(*outcome.notes, *_left_out(held_out, outcome.candidates)))


def _left_out(held_out: HeldOut, compared: Sequence[Candidate]) -> tuple[str, ...]:
    """A note on the held-out samples that no KL could be compared on."""
    known = set(compared[0].measured["sample"])
    missing = [s.id for group in held_out.groups for s in group if s.id not in known]
    if not missing:
        return ()
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    samples = counted(len(missing) + len(known), "held-out sample")
    return (
        f"{len(missing)} of {samples} left out of the selection, since "
        f"they have no finite KL under every list: {shown}.",
    )


@dataclass(frozen=True)
class Scoring:
    """What answers are scored with, and where they are kept."""

    subject: Subject
    work: ScanSamples
    metric: Metric
    batching: Batching
    process: Process

    def measure(self, kept: frozenset[str]) -> tuple[Scored | None, tuple[str, ...]]:
        """(the metric of 16-bit, of nothing kept and of the list `kept`, notes on samples that do not count).

        None where no held-out sample counts. 4-bit is the scan's format, so calibrated where that is. Each
        costs a generation of answers, of which those that are known are not repeated.
        Raises QprobeError for a sample that a user's function fails on, RunError if the disk refuses.
        """
        samples = [s for group in self.work.held_out for s in group] if self.subject.answers else []
        counting = [s for s in samples if self.metric.counts(self.work.as_given(s))]
        if not counting:
            why = f"none of them brings {self.metric.needs}" if samples else "there are none"
            return None, (f"{self.metric.name} is not measured on held-out samples: {why}.",)
        lists = {SIXTEEN_BIT: None, self.process.run.key.format.name: frozenset[str]()}
        if kept:
            lists[DYNAMIC] = kept
        given = [self.work.as_given(s) for s in counting]
        scores = {name: self.metric.scores(given, self._answers(counting, x)) for name, x in lists.items()}
        found = scored(self.metric.name, self.metric.is_share, scores)
        left_out = self.metric.left_out([self.work.as_given(s) for s in samples])
        return replace(found, left_out=len(samples) - len(counting)), left_out

    def _answers(self, samples: Sequence[Sample], kept: frozenset[str] | None) -> list[str]:
        """The greedy answers; kept: the layers in 16-bit, None for all, whose answers are known in part."""
        known = {id(s) for s in samples if kept is None and s.id in self.work.answered}
        asked = tuple(s for s in samples if id(s) not in known)
        own = own_answers(self.subject, asked, self.batching, self.process, self._form(kept))
        return [(own[id(s)] if id(s) in own else s).answer or "" for s in samples]

    def _form(self, kept: frozenset[str] | None) -> AnsweredBy:
        if kept is None:
            return AnsweredBy(METRIC_STAGE)
        subject, run = self.subject, self.process.run
        names = subject.quantized - kept
        codes = None if run.codes is None else run.codes.sha256
        what = json.dumps([asdict(run.key.format), codes, sorted(names)])
        return AnsweredBy(
            METRIC_STAGE, what, lambda: in_four_bit(subject.modules, subject.dequantized, names)
        )
