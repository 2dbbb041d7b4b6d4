"""Metrics of answers: what each one counts, and what a function of the user may return."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from math import inf, nan
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qprobe.errors import QprobeError
from qprobe.inputs.metrics import metric_of, metrics_for
from qprobe.records import Fact, Sample, Score, asked
from qprobe.registry import metrics as declared

WRONG, RIGHT, SILENT = Score(0.0, 1), Score(1.0, 1), Score()


def sample(answer: str | None, *phrases: str, name: str = "a") -> Sample:
    facts = tuple(Fact(str(i), phrase) for i, phrase in enumerate(phrases))
    return Sample(name, asked("What is it?"), answer, facts=facts)


def scored(metric: str, given: str | None, answer: str) -> Score:
    return metric_of(metric).scores([sample(given)], [answer])[0]


@pytest.mark.parametrize(
    ("given", "answer", "expected"),
    [
        ("7 bar", "7 bar", RIGHT),
        ("7 bar", "\n 7 bar\t", RIGHT),
        (" 7 bar ", "7 bar", RIGHT),
        ("caf\u00e9", "cafe\u0301", RIGHT),  # one letter, or a letter and its accent
        ("\ufb01ve", "five", WRONG),  # NFC keeps the ligature, NFKC would not
        ("7 bar", "7 Bar", WRONG),
        ("7 bar", "7  bar", WRONG),
        ("7 bar", "7 bar.", WRONG),
        ("", "", RIGHT),
        ("", "something", WRONG),
        (None, "", SILENT),
    ],
)
def test_exact_is_equality_but_for_outer_space_and_the_unicode_form(given, answer, expected):
    assert scored("exact", given, answer) == expected


@pytest.mark.parametrize(
    ("given", "answer", "expected"),
    [
        ("7 bar", "It reads 7 BAR, below the limit.", RIGHT),
        (" 7 bar\n", "7 bar", RIGHT),
        ("7", "It reads 17 bar.", WRONG),
        ("7", "It reads 7bar.", WRONG),
        ("rust", "It is rusty.", WRONG),
        ("a.c", "abc", WRONG),  # the given answer is text, no pattern
        ("C++", "It is written in C++.", RIGHT),
        ("caf\u00e9", "The CAFE\u0301 is open.", RIGHT),
        ("yes", "", WRONG),
        ("", "anything", SILENT),
        (" \n", "anything", SILENT),
        (None, "anything", SILENT),
    ],
)
def test_contains_wants_whole_words_in_any_case(given, answer, expected):
    assert scored("contains", given, answer) == expected


def test_facts_are_counted_each():
    found = metric_of("facts").scores(
        [sample(None, "7 bar", "rust"), sample("no matter"), sample(None, "oak")],
        ["RUST at 17 bar", "", "It is oak."],
    )
    assert found == (Score(1.0, 2), Score(0.0, 0), Score(1.0, 1))


@pytest.mark.parametrize(
    "value", [1, 1.0, True, Fraction(1), np.float32(1), np.bool_(True), np.array([1]), torch.tensor(1.0)]
)
def test_any_real_number_counts(value):
    assert metric_of(lambda s, a: value).scores([sample(None)], ["x"]) == (RIGHT,)


@pytest.mark.parametrize(
    "value",
    [None, "1", nan, inf, -inf, [1], 1j, Decimal(1), np.array([1, 2]), torch.ones(2), np.float64(nan)],
)
def test_what_is_no_finite_number_names_the_sample(value):
    with pytest.raises(QprobeError, match=r"metric odd returned .* on sample the-third, which is no finite"):
        odd = lambda s, a: value if s.id == "the-third" else 0  # noqa: E731
        odd.__name__ = "odd"
        metric_of(odd).scores([sample(None), sample(None, name="the-third")], ["", ""])


def test_a_function_that_raises_names_the_sample_and_keeps_the_cause():
    def broken(sample, answer):
        return 1 / len(answer)

    with pytest.raises(
        QprobeError, match=r"broken raised ZeroDivisionError \(division by zero\) on sample b\."
    ) as e:
        metric_of(broken).scores([sample(None), sample(None, name="b")], ["x", ""])
    assert isinstance(e.value.__cause__, ZeroDivisionError)


def test_ctrl_c_in_a_function_is_no_mistake_of_it():
    def interrupted(sample, answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        metric_of(interrupted).scores([sample(None)], [""])


def test_a_function_has_its_own_name():
    class Judge:
        def __call__(self, sample, answer):
            return 0

    assert [metric_of(x).name for x in (scored, lambda s, a: 0, Judge())] == ["scored", "metric", "Judge"]


@pytest.mark.parametrize("asked_for", ["bleu", "", "EXACT", 3, SimpleNamespace()])
def test_what_is_no_metric_is_refused_with_those_there_are(asked_for):
    with pytest.raises(
        QprobeError, match=r"is no metric\. Pass one of exact, contains, facts, or from Python"
    ):
        metric_of(asked_for)


def test_facts_are_taken_wherever_a_sample_brings_some():
    with_facts = [sample("a"), sample("a", "oak")]
    assert [m.name for m in metrics_for(None, with_facts)] == ["facts"]
    assert [m.name for m in metrics_for(metric_of("exact"), with_facts)] == ["facts", "exact"]
    assert [m.name for m in metrics_for(metric_of("facts"), with_facts)] == ["facts"]
    assert [m.name for m in metrics_for(metric_of("exact"), with_facts[:1])] == ["exact"]
    assert metrics_for(None, with_facts[:1]) == ()


def test_samples_that_do_not_count_are_named():
    metric = metric_of("exact")
    asked_of = [sample(None, name=f"photo-{i}") for i in range(4)] + [sample("x")]
    assert metric.left_out(asked_of) == (
        "exact: 4 of 5 samples do not count, without a given answer (photo-0, photo-1, photo-2, ...).",
    )
    assert metric.left_out(asked_of[4:]) == ()
    assert (
        metric_of(lambda s, a: 1 / len(a)).left_out(asked_of) == ()
    )  # a user's counts all, and is not asked


@pytest.mark.parametrize("name", declared.names())
def test_every_declared_metric_is_there(name):
    assert metric_of(name).name == name and metric_of(name).is_share
