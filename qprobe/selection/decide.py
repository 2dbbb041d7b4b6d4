"""Measurement decides: which of several candidate lists to take, from KL measured on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum, nan

import numpy as np
import pandas as pd

from qprobe.runs.statistics import ratio_se

# Of standard 4-bit's bytes. Lists for one budget all come close to it, and by how much is chance: it depends
# on which layer happened to fit last. What a user would notice is more than that.
SAME_SIZE = 0.005


@dataclass(frozen=True)
class Candidate:
    """One skip-list that was measured.

    measured: a row for each held-out sample: sample, answer_tokens, kl_sum (nats); the same ones for all
        (see `on_common_samples`).
    predicted_kl: what the scores say it leaves, nats per token; NaN where the scores are no KL.
    """

    name: str
    kept: frozenset[str]
    total_bytes: int
    measured: pd.DataFrame
    predicted_kl: float = nan

    @property
    def kl(self) -> float:
        """Measured KL in nats per answer token."""
        return _ratio(self.measured["kl_sum"], self.measured["answer_tokens"])

    @property
    def kl_se(self) -> float:
        """Standard error of `kl` over samples; NaN for fewer than two."""
        return ratio_se(self.measured["kl_sum"], self.measured["answer_tokens"])


@dataclass(frozen=True)
class Decision:
    """The candidate to take, and why; `tied` are others that could not be told from the best."""

    chosen: Candidate
    best: Candidate
    tied: tuple[Candidate, ...]
    why: str


def difference(a: Candidate, b: Candidate) -> tuple[float, float]:
    """(KL of `a` - KL of `b`, its standard error), paired by sample, nats per answer token."""
    joined = a.measured.merge(b.measured, on="sample", suffixes=("_a", "_b"), validate="one_to_one")
    assert len(joined) == len(a.measured) == len(b.measured), "candidates were measured on different samples"
    gaps = joined["kl_sum_a"] - joined["kl_sum_b"]
    return _ratio(gaps, joined["answer_tokens_a"]), ratio_se(gaps, joined["answer_tokens_a"])


def on_common_samples(candidates: Sequence[Candidate]) -> list[Candidate]:
    """`candidates` on the samples on which the KL of every one of them is finite, in their order."""
    finite = [c.measured.loc[np.isfinite(c.measured["kl_sum"].to_numpy(np.float64))] for c in candidates]
    common = set.intersection(*(set(rows["sample"]) for rows in finite)) if finite else set()
    return [
        replace(c, measured=rows.loc[rows["sample"].isin(common)])
        for c, rows in zip(candidates, finite, strict=True)
    ]


def decide(candidates: Sequence[Candidate], standard: Candidate) -> Decision:
    """The candidate to take: the lowest measured KL, or the smallest that cannot be told from it.

    "Cannot be told apart": the paired difference is within one standard error. Sizes that differ by less than
    `SAME_SIZE` are one size, and the lowest measured KL decides among them. Nothing that measured worse than
    `standard` (nothing kept) is ever taken.
    """
    everything = [standard, *candidates]
    best = min(everything, key=lambda c: (c.kl, c.total_bytes))
    tied = tuple(c for c in everything if c is not best and _is_tied(c, best))
    allowed = [c for c in (best, *tied) if c.kl <= standard.kl]
    limit = min(c.total_bytes for c in allowed) + SAME_SIZE * standard.total_bytes
    chosen = min((c for c in allowed if c.total_bytes <= limit), key=lambda c: (c.kl, c.total_bytes))
    return Decision(chosen, best, tied, _why(chosen, best, tied, standard))


def _is_tied(candidate: Candidate, best: Candidate) -> bool:
    if candidate.kept == best.kept:
        return True
    gap, error = difference(candidate, best)
    return gap <= error  # False where the error is unknown (NaN)


def _why(chosen: Candidate, best: Candidate, tied: tuple[Candidate, ...], standard: Candidate) -> str:
    if chosen is standard:
        return "No list measured better than keeping nothing, within its error; nothing is kept."
    others = [c.name for c in (best, *tied) if c.kept != chosen.kept]
    if not others:
        return f"{chosen.name} measured lowest, and no other list comes within its error."
    return (
        f"The lists {', '.join([chosen.name, *others])} cannot be told apart within the error; "
        f"of the smallest, {chosen.name} measured lowest."
    )


def _ratio(numerators: pd.Series, weights: pd.Series) -> float:
    total = fsum(weights)
    return fsum(numerators) / total if total else nan
