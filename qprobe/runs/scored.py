"""What a metric of answers says of several models on the same samples, with errors paired by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from qprobe.records import Score
from qprobe.runs.statistics import ratio


@dataclass(frozen=True)
class Mean:
    """A mean over samples and its standard error; None where no sample counts, or too few for an error."""

    value: float | None
    se: float | None


@dataclass(frozen=True)
class Difference:
    """The mean of `model` minus that of `against`; se: its standard error, from differences by sample."""

    model: str
    against: str
    value: float | None
    se: float | None

    @property
    def is_found(self) -> bool | None:
        """True if it is more than twice its error; None where the error is unknown."""
        return None if self.value is None or self.se is None else abs(self.value) > 2 * self.se


@dataclass(frozen=True)
class Scored:
    """One metric of several models. samples: how many count; left_out: how many do not.

    means: by model, in the order they were run. differences: of each model to each one before it.
    """

    name: str
    is_share: bool
    samples: int
    left_out: int
    means: dict[str, Mean]
    differences: tuple[Difference, ...]

    def difference(self, model: str, against: str) -> Difference:
        """That of `model`, which was run after `against`."""
        return next(x for x in self.differences if (x.model, x.against) == (model, against))

    def to_json(self) -> dict[str, Any]:
        """The object that `compare --json` and `scan --json` document."""
        return {
            "name": self.name,
            "is_share": self.is_share,
            "samples": self.samples,
            "left_out": self.left_out,
            "means": {name: vars(mean) for name, mean in self.means.items()},
            "differences": [{**vars(x), "is_found": x.is_found} for x in self.differences],
        }


def scored(name: str, is_share: bool, scores: Mapping[str, Sequence[Score]]) -> Scored:
    """The metric `name` from the scores of each model, all on the same samples in the same order.

    A sample counts by its weight. The error of a difference is that of the differences by sample, so what all
    models find hard or easy is not in it (`qprobe.runs.statistics.ratio_se`).
    """
    weights = [x.weight for x in next(iter(scores.values()), ())]
    assert all([x.weight for x in row] == weights for row in scores.values()), "a metric weighs samples alike"
    values = {model: [x.value for x in row] for model, row in scores.items()}
    return Scored(
        name=name,
        is_share=is_share,
        samples=sum(w > 0 for w in weights),
        left_out=sum(w == 0 for w in weights),
        means={model: Mean(*ratio(row, weights)) for model, row in values.items()},
        differences=tuple(
            Difference(model, against, *_paired(values[model], values[against], weights))
            for against, model in combinations(values, 2)
        ),
    )


def _paired(
    values: Sequence[float], others: Sequence[float], weights: Sequence[int]
) -> tuple[float | None, float | None]:
    return ratio([a - b for a, b in zip(values, others, strict=True)], weights)
