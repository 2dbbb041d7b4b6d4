"""What a comparison says: one row per model, metrics of the answers, and the answers themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qprobe.checkpoint.comparing.course import Course, ModelResult
from qprobe.runs.scored import Scored, scored
from qprobe.runs.statistics import ratio


@dataclass(frozen=True)
class Row:
    """One model of the comparison; shares are 0 to 1, None is what does not apply.

    kl: nats per answer token to the 16-bit model; kl_se: its standard error over samples.
    top1_agreement: share of answer tokens with the same most probable token.
    answer_agreement: share of samples with exactly the 16-bit model's greedy answer.
    """

    name: str
    parameter_bytes: int
    total_bytes: int
    kl: float | None
    kl_se: float | None
    top1_agreement: float | None
    answer_agreement: float


@dataclass(frozen=True)
class ComparedSample:
    """The greedy answers to one prompt; answers: row name -> text."""

    id: str
    prompt: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; notes are sentences a reader must see (skipped files).

    metrics: of the greedy answers, for all rows: the facts of the samples where they bring some, and the one
    that was asked for.
    """

    rows: tuple[Row, ...]
    samples: tuple[ComparedSample, ...]
    metrics: tuple[Scored, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object of `compare --json`: rows, metrics and samples."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "metrics": [metric.to_json() for metric in self.metrics],
            "samples": [asdict(s) for s in self.samples],
        }


def compared(results: Mapping[str, ModelResult], course: Course, notes: tuple[str, ...]) -> Comparison:
    """What `results` say, by row name; the first is that of the model that set `course`."""
    reference = next(iter(results.values()))
    told = dict.fromkeys((*notes, *(note for result in results.values() for note in result.notes)))
    return Comparison(
        rows=tuple(row(name, result, reference) for name, result in results.items()),
        samples=tuple(
            ComparedSample(s.id, s.prompt, {name: result.answers[i] for name, result in results.items()})
            for i, s in enumerate(course.samples)
        ),
        metrics=tuple(
            scored(metric.name, metric.is_share, {name: result.scores[i] for name, result in results.items()})
            for i, metric in enumerate(course.metrics)
        ),
        notes=tuple(told),
    )


def row(name: str, result: ModelResult, reference: ModelResult) -> Row:
    """The numbers of one model."""
    kl, kl_se = ratio([s.kl for s in result.sums], [s.tokens for s in result.sums])
    top1, _ = ratio([s.top1_agree for s in result.sums], [s.tokens for s in result.sums])
    same = sum(mine == theirs for mine, theirs in zip(result.answers, reference.answers, strict=True))
    return Row(
        name=name,
        parameter_bytes=result.stored.parameter_bytes,
        total_bytes=result.stored.total_bytes,
        kl=kl,
        kl_se=kl_se,
        top1_agreement=top1,
        answer_agreement=same / len(result.answers),
    )
