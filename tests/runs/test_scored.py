"""Metrics of several models: means, paired errors by hand, and which differences are found."""

from __future__ import annotations

import json
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe.records import Score
from qprobe.runs.scored import Difference, Mean, scored


def ones(*values: float) -> list[Score]:
    return [Score(v, 1) for v in values]


def test_errors_of_differences_are_paired_by_sample():
    # Differences 0, 0, 0, 1: mean 1/4; se^2 = 4/3 * (3 * 1/16 + 9/16) / 16 = 1/16. Unpaired, of means 1/2 and
    # 3/4, it would be 4/3 * (4 * 1/4) / 16 + 4/3 * (3/16 + 9/16) / 16 = 1/12 + 1/16, more than twice as much.
    found = scored("exact", True, {"nf4": ones(0, 0, 1, 1), "dynamic": ones(1, 0, 1, 1)})
    assert found.means["nf4"].value == 0.5 and found.means["dynamic"].value == 0.75
    assert found.means["nf4"].se == pytest.approx(sqrt(1 / 12))
    (difference,) = found.differences
    assert (difference.model, difference.against, difference.value) == ("dynamic", "nf4", 0.25)
    assert difference.se == pytest.approx(sqrt(1 / 16)) and difference.is_found is False


def test_a_sample_counts_by_its_weight():
    # Facts 1 of 2 and 2 of 2 and 1 of 1, one sample without any: 4 of 5, not the mean of 1/2, 1 and 1.
    # Differences 1 of 2, 0 of 2, 0 of 1: 1/5; residuals 1 - 2/5, -2/5, -1/5;
    # se^2 = 3/2 * (9/25 + 4/25 + 1/25) / 25 = 21/625.
    model, other = [(1, 2), (2, 2), (0, 0), (1, 1)], [(0, 2), (2, 2), (0, 0), (1, 1)]
    found = scored("facts", True, {"b": [Score(*x) for x in other], "a": [Score(*x) for x in model]})
    assert (found.samples, found.left_out) == (3, 1)
    assert found.means["a"].value == 4 / 5
    assert found.difference("a", "b").value == pytest.approx(1 / 5)
    assert found.difference("a", "b").se == pytest.approx(sqrt(21) / 25)


def test_every_pair_is_there_the_later_model_against_the_earlier():
    found = scored("m", False, {"16-bit": ones(1, 2), "nf4": ones(0, 1), "dynamic": ones(1, 2)})
    assert [(x.model, x.against) for x in found.differences] == [
        ("nf4", "16-bit"), ("dynamic", "16-bit"), ("dynamic", "nf4")
    ]  # fmt: skip
    assert found.difference("nf4", "16-bit") == Difference("nf4", "16-bit", -1.0, 0.0)
    assert found.difference("nf4", "16-bit").is_found is True  # the same on every sample
    assert found.difference("dynamic", "16-bit").is_found is False  # none at all


@pytest.mark.parametrize(
    ("value", "se", "is_found"),
    [(0.2, 0.1, False), (0.21, 0.1, True), (-0.21, 0.1, True), (0.0, 0.0, False), (1.0, None, None)],
)
def test_a_difference_is_found_beyond_twice_its_error(value, se, is_found):
    assert Difference("a", "b", value, se).is_found is is_found


def test_one_sample_has_no_error_and_none_has_no_mean():
    one = scored("m", False, {"a": ones(1), "b": ones(3)})
    assert one.means["a"] == Mean(1.0, None) and one.differences[0] == Difference("b", "a", 2.0, None)
    none = scored("m", True, {"a": [Score()], "b": [Score()]})
    assert none.means["a"] == Mean(None, None) and (none.samples, none.left_out) == (0, 1)
    assert none.differences[0].value is None and none.differences[0].is_found is None


def test_the_json_is_the_contract():
    found = json.loads(json.dumps(scored("exact", True, {"a": ones(1, 0), "b": ones(1, 1)}).to_json()))
    assert found == {
        "name": "exact", "is_share": True, "samples": 2, "left_out": 0,
        "means": {"a": {"value": 0.5, "se": 0.5}, "b": {"value": 1.0, "se": 0.0}},
        "differences": [{"model": "b", "against": "a", "value": 0.5, "se": 0.5, "is_found": False}],
    }  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=12), st.integers(-5, 5)
)
def test_what_all_models_find_hard_is_not_in_the_error(pairs, shift):
    def found(offsets: list[int]) -> Difference:
        first = ones(*(a + x for (a, _), x in zip(pairs, offsets, strict=True)))
        second = ones(*(b + x for (_, b), x in zip(pairs, offsets, strict=True)))
        return scored("m", False, {"a": first, "b": second}).differences[0]

    plain, moved = found([0] * len(pairs)), found([shift * i for i in range(len(pairs))])
    assert moved == plain
