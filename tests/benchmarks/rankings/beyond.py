"""What might lower held-out KL beyond one additive pass at equal bytes.

All of it uses calibration samples only; held-out samples are for the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from scipy.stats import rankdata

from qprobe.inputs.batch import Batch
from qprobe.measure.subject import Subject
from qprobe.selection.search.damage import Damage
from tests.benchmarks.rankings.additive import Scores, attributed, mean_scores, path_rows
from tests.benchmarks.rankings.lists import Chooser
from tests.benchmarks.rankings.measured import Measured, path_without


def geometric_mean(path: Scores, fisher: Scores) -> Scores:
    """sqrt(path x Fisher), path below zero as zero."""
    return {name: sqrt(max(value, 0.0) * fisher[name]) for name, value in path.items()}


def clipped_sum(path: Scores, fisher: Scores) -> Scores:
    """Shares of the path's positive part and of Fisher, added."""
    positive = {name: max(value, 0.0) for name, value in path.items()}
    totals = sum(positive.values()), sum(fisher.values())
    return {name: value / totals[0] + fisher[name] / totals[1] for name, value in positive.items()}


def mean_of_ranks(path: Scores, fisher: Scores) -> Scores:
    """The mean of both ranks of a layer (the greatest score has the greatest rank)."""
    names = list(path)
    ranks = rankdata([path[n] for n in names]) + rankdata([fisher[n] for n in names])
    return dict(zip(names, (ranks / 2).tolist(), strict=True))


def attributed_again(
    subject: Subject, batches: Sequence[Batch], chooser: Chooser, damage: Damage, share: float
) -> frozenset[str]:
    """Keep half the budget by `damage`, measure what is still in 4-bit, and spend the rest by that."""
    half = chooser.damage_lists(damage)(share / 2)
    assert half is not None
    left = mean_scores(path_rows(attributed(path_without(subject, half), batches)))
    return chooser.kept_with(left, share, half)


def swapped(
    measured: Measured, chooser: Chooser, scores: Scores, share: float, proposals: int
) -> frozenset[str]:
    """Start from the list by `scores`; force groups at its edge in or out while calibration KL falls.

    The edge is where score per byte decides: the `proposals` / 2 kept groups with the least and as many other
    groups with the most. Each proposal is the best list by `scores` with that group forced; a proposal costs
    one forward pass of the samples.
    """
    now = dict(scores)
    kept = chooser.kept(now, share)
    for names in _edge(chooser, scores, kept, proposals):
        value = 0.0 if kept.issuperset(names) else sum(scores.values())
        moved = {**now, **dict.fromkeys(names, value)}
        other = chooser.kept(moved, share)
        if measured.kl(other) < measured.kl(kept):
            now, kept = moved, other
    return kept


def _edge(chooser: Chooser, scores: Scores, kept: frozenset[str], proposals: int) -> list[tuple[str, ...]]:
    """The groups nearest to the decision, kept and not kept in turn."""
    rates = {
        names: sum(scores[n] for n in names) / chooser.cost_bytes(names)
        for names in chooser.groups().values()
    }
    inside = sorted((g for g in rates if kept.issuperset(g)), key=lambda g: rates[g])
    outside = sorted((g for g in rates if not kept.issuperset(g)), key=lambda g: -rates[g])
    pairs = zip(inside[: proposals // 2], outside[: proposals // 2], strict=False)
    return [group for pair in pairs for group in pair]
