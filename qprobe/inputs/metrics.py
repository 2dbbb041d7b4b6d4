"""Metrics of answers: declared ones, and any function of (sample, answer) to a number; no torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

from qprobe.errors import QprobeError
from qprobe.options import AskedMetric
from qprobe.records import Fact, Sample, Score
from qprobe.registry import metrics as declared
from qprobe.registry.implementation import imported
from qprobe.system.wording import counted, named

_SHOWN = 80  # characters of what a user's function returned


@dataclass(frozen=True)
class Metric:
    """A metric as it is taken. is_share: its values are shares from 0 to 1.

    needs: what a sample must bring to count, in words; empty where every sample counts.
    """

    name: str
    score: Callable[[Sample, str], Score]
    is_share: bool
    needs: str = ""

    def scores(self, samples: Sequence[Sample], answers: Sequence[str]) -> tuple[Score, ...]:
        """The score of each answer; `samples` as they were given, so without an answer where none was.

        Raises QprobeError, naming the sample, if a user's function raises or returns no finite number.
        """
        return tuple(self.score(sample, answer) for sample, answer in zip(samples, answers, strict=True))

    def counts(self, sample: Sample) -> bool:
        """True if an answer to `sample`, as it was given, counts."""
        return not self.needs or self.score(sample, "").weight > 0

    def left_out(self, samples: Sequence[Sample]) -> tuple[str, ...]:
        """A sentence on those of `samples` that do not count; none where all do."""
        missing = [s.id for s in samples if not self.counts(s)]
        if not missing:
            return ()
        of = f"{len(missing)} of {counted(len(samples), 'sample')}"
        verb = "does" if len(missing) == 1 else "do"
        return (f"{self.name}: {of} {verb} not count, without {self.needs} ({named(missing)}).",)


def metric_of(asked: AskedMetric) -> Metric:
    """The metric that was asked for: a declared name, or a function of (sample, answer) to a number.

    A function is named as Python names it. Raises QprobeError for anything else.
    """
    if callable(asked):
        name = getattr(asked, "__name__", type(asked).__name__)
        name = "metric" if name == "<lambda>" else name
        return Metric(name, _checked(name, asked), is_share=False)
    found = declared.find(asked) if isinstance(asked, str) else None
    if found is None:
        raise QprobeError(
            f"{asked!r} is no metric. Pass one of {', '.join(declared.names())}, or from Python a function "
            "of (sample, answer) that returns a number."
        )
    return Metric(found.name, imported(found.implementation), is_share=True, needs=found.needs)


def metrics_for(asked: Metric | None, samples: Sequence[Sample]) -> tuple[Metric, ...]:
    """The metric that was asked for, and facts wherever a sample brings some."""
    metrics = () if asked is None else (asked,)
    if any(s.facts for s in samples) and all(m.name != declared.FACTS for m in metrics):
        return (metric_of(declared.FACTS), *metrics)
    return metrics


def exact(sample: Sample, answer: str) -> Score:
    """1 if `answer` equals the given one, but for outer white space and the Unicode form (NFC)."""
    if sample.answer is None:
        return Score()
    return Score(float(_normal(sample.answer) == _normal(answer)), 1)


def contains(sample: Sample, answer: str) -> Score:
    """1 if the given answer stands in `answer` as whole words, upper and lower case alike (both in NFC).

    An empty given answer stands in none, so it does not count.
    """
    if sample.answer is None or not _normal(sample.answer):
        return Score()
    return Score(float(Fact("answer", _normal(sample.answer)).stated_in(_normal(answer))), 1)


def facts(sample: Sample, answer: str) -> Score:
    """How many of the sample's facts `answer` states, out of all."""
    return Score(float(sum(fact.stated_in(answer) for fact in sample.facts)), len(sample.facts))


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _checked(name: str, function: Callable[[Sample, str], Any]) -> Callable[[Sample, str], Score]:
    """`function`, whose mistakes name the sample."""

    def score(sample: Sample, answer: str) -> Score:
        """The value of one answer; QprobeError where the function fails or gives no finite number."""
        try:
            value = function(sample, answer)
        except Exception as error:
            raise QprobeError(
                f"The metric {name} raised {type(error).__name__} ({error}) on sample {sample.id}. It takes "
                "(sample, answer) and returns a number; sample.answer is None where none was given."
            ) from error
        number = _number(value)
        if number is None:
            raise QprobeError(
                f"The metric {name} returned {repr(value)[:_SHOWN]} on sample {sample.id}, which is no "
                "finite number. Return one for every sample."
            )
        return Score(number, 1)

    return score


def _number(value: Any) -> float | None:
    """`value` as a finite number, also of an array or tensor that holds just one; else None."""
    try:
        plain = value.item() if callable(getattr(value, "item", None)) else value
        number = float(plain) if isinstance(plain, Real) else None
    except (ValueError, RuntimeError, OverflowError):
        return None
    return number if number is not None and isfinite(number) else None
