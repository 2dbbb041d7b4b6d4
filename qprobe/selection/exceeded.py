"""A list that is predicted to be within a bound on KL, but was measured above it."""

from __future__ import annotations

from dataclasses import dataclass

from qprobe.errors import BudgetError
from qprobe.runs.folder import RunFolder
from qprobe.selection.bound import Bound, rounded_up
from qprobe.selection.candidates import frontier, nothing_kept
from qprobe.selection.scores import ScoredRun
from qprobe.selection.skiplist import SkipList
from qprobe.selection.to_manifest import held_out_quality
from qprobe.system.wording import counted


@dataclass(frozen=True)
class _Measured:
    """A list with its KL on the held-out samples, nats per answer token."""

    skiplist: SkipList
    kl: float

    @property
    def said(self) -> str:
        return f"{self.kl:.3g}, with {self.skiplist.total_bytes:,} bytes"


def refuse_measured_above(folder: RunFolder, run: ScoredRun, skiplist: SkipList, bound: Bound) -> None:
    """Raises BudgetError if `folder` holds a measured KL of `skiplist` that is above `bound`.

    It names the smallest list of the run's frontier that measured within the bound, or the smallest KL.
    """
    quality = held_out_quality(folder, run.scan, skiplist)
    if quality.kl_dynamic is None or quality.kl_dynamic <= bound.max_kl:
        return
    own = _Measured(skiplist, quality.kl_dynamic)
    measured = [own, *_others(folder, run)]
    within = [x for x in measured if x.kl <= bound.max_kl]
    if within:
        found = min(within, key=lambda x: (x.skiplist.total_bytes, x.kl))
        what = f"The smallest list that measured within it leaves {found.said}."
        by = "" if found.skiplist.by == run.score else f" --by {found.skiplist.by}"
        advice = f"Pass --budget {found.skiplist.total_bytes}B{by} in place of --max-kl to choose at its size"
    else:
        found = min(measured, key=lambda x: (x.kl, x.skiplist.total_bytes))
        what = f"The smallest KL that this run measured is {found.said}."
        advice = f"Pass --max-kl {rounded_up(found.kl)} or more"
    raise BudgetError(
        f"The list that is predicted to leave a KL of {bound.max_kl:g} or less measured above it, on "
        f"{counted(quality.samples or 0, 'held-out sample')}: {own.said}. {what} {advice}, or let "
        f"`qprobe scan --max-kl {bound.max_kl:g}` search by measured KL."
    )


def _others(folder: RunFolder, run: ScoredRun) -> list[_Measured]:
    """The lists of the frontier, and that with nothing kept, as far as they were measured."""
    lists = [nothing_kept(run, None), *frontier(run, None).values()]
    found = ((x, held_out_quality(folder, run.scan, x).kl_dynamic) for x in lists)
    return [_Measured(x, kl) for x, kl in found if kl is not None]
