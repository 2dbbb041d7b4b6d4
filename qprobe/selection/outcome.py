"""Measurement decides: from what was measured of the candidates to the selection and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

from qprobe.errors import BudgetError
from qprobe.manifest.records import NEAREST, NOTHING, Compared, Quality
from qprobe.selection.bound import Bound, measured_skiplist, rounded_up
from qprobe.selection.budget import Budget, all_fit
from qprobe.selection.candidates import nothing_kept
from qprobe.selection.decide import Candidate, decide, on_common_samples
from qprobe.selection.request import ListRequest
from qprobe.selection.scores import ScoredRun, prospect_of
from qprobe.selection.select import asked_skiplist
from qprobe.selection.skiplist import SkipList
from qprobe.selection.to_manifest import NO_PROOF, Proof
from qprobe.selection.verdict import calibration_verdict, verdict

CHOSEN_HERE = (
    "The list was chosen on these samples, which flatters it; `qprobe compare` measures it on others."
)
"""What goes with the KL of a list: the lowest of several measured ones lies below what it is on average."""


class Measuring(Protocol):
    """What measures skip-lists on held-out samples."""

    def measure(self, skiplists: Mapping[str, SkipList]) -> dict[str, Candidate]:
        """Each skip-list as a candidate of the same name."""
        ...

    def nearest(self, run: ScoredRun) -> list[Candidate]:
        """Standard 4-bit beside calibrated weights, named `NEAREST`; none where they are it."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The skip-list that won, the budget it is within, its proof, its verdict, and what a reader must know.

    candidates: those it was chosen among, on their common samples; none where nothing could be measured.
    """

    skiplist: SkipList
    budget: Budget
    proof: Proof
    verdict: str
    notes: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()


def by_score(run: ScoredRun, request: ListRequest) -> Outcome:
    """The outcome where nothing can be measured."""
    skiplist, budget = asked_skiplist(run, request)
    said = f"No KL was measured on held-out samples; the list is chosen by {skiplist.by} alone."
    return Outcome(skiplist, budget, NO_PROOF, said)


def within_budget(
    run: ScoredRun, budget: Budget, skiplists: Mapping[str, SkipList], candidates: Sequence[Candidate]
) -> Outcome:
    """The one of `candidates` (of `skiplists`, nothing kept first) that measured best, see `decide`."""
    lists, nearest = _apart(candidates)
    decision = decide(lists[1:], lists[0])
    won = decision.chosen
    said = _said(run, lists, won, nearest)
    is_tied = any(c.kept != won.kept for c in (decision.best, *decision.tied))
    roomy = all_fit(budget, run.inventory)
    notes = (*([decision.why] if is_tied else []), *([roomy] if roomy else []))
    proof = _proof(candidates, won)
    return Outcome(skiplists[won.name], budget, proof, said, notes, tuple(candidates))


def within_bound(run: ScoredRun, bound: Bound, standard: Candidate, held_out: Measuring) -> Outcome:
    """The list of the fewest bytes whose KL, measured on the held-out samples, is within `bound`.

    standard: nothing kept, measured. Raises BudgetError if no list short of 16-bit is.
    """

    def kl_of(skiplist: SkipList) -> float:
        return on_common_samples(list(held_out.measure({"list": skiplist}).values()))[0].kl

    nothing = nothing_kept(run, None)
    skiplists, best = {NOTHING: nothing}, nothing
    if standard.kl > bound.max_kl:
        best, tried = measured_skiplist(prospect_of(run), bound, kl_of)
        skiplists |= {f"list {i}": skiplist for i, skiplist in enumerate(tried, start=1)}
    candidates = on_common_samples([*held_out.measure(skiplists).values(), *held_out.nearest(run)])
    lists, nearest = _apart(candidates)
    if best is None:
        least = min(lists, key=lambda c: c.kl)
        raise BudgetError(
            f"No list short of 16-bit leaves a KL of {bound.max_kl} or less on the held-out samples: the "
            f"smallest of {len(lists)} measured is {least.kl:.3g}, with {least.total_bytes:,} bytes. "
            f"Pass --max-kl {rounded_up(least.kl)} or more, or use the 16-bit model."
        )
    won = next(c for c in lists if skiplists[c.name] == best)
    said = _said(run, lists, won, nearest, bound.max_kl)
    return Outcome(best, bound.budget_of(best), _proof(candidates, won), said, (), tuple(candidates))


def _apart(candidates: Sequence[Candidate]) -> tuple[list[Candidate], Candidate | None]:
    """(lists, standard 4-bit beside calibrated weights): the latter is named `NEAREST` and never chosen."""
    nearest = [c for c in candidates if c.name == NEAREST]
    return [c for c in candidates if c.name != NEAREST], nearest[0] if nearest else None


def _said(
    run: ScoredRun,
    lists: Sequence[Candidate],
    won: Candidate,
    nearest: Candidate | None,
    max_kl: float | None = None,
) -> str:
    """The verdict on `won`, one of `lists`, of which the first keeps nothing."""
    said = verdict(lists[0], won, run.standard_bytes, max_kl, nearest, run.scan.readout)
    if won.kept and len(lists) > 1:
        said += f" {CHOSEN_HERE}"
    if nearest is None:
        return said
    unpaid = calibration_verdict(lists[0], nearest, run.scan.format.precision.stored.name)
    return f"{said} {unpaid}".strip()


def _proof(candidates: Sequence[Candidate], won: Candidate) -> Proof:
    """What was measured of `won` and the others; the first is standard 4-bit or, of calibrated weights, the
    one named `NEAREST`.
    """
    lists, nearest = _apart(candidates)
    compared = tuple(
        Compared(c.name, c.total_bytes, c.kl, c.kl_se if isfinite(c.kl_se) else None, c is won)
        for c in candidates
    )
    return Proof(Quality(len(won.measured), (nearest or lists[0]).kl, won.kl, None), compared)
