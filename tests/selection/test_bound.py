"""The fewest bytes for a bound on KL, predicted and measured."""

from __future__ import annotations

from math import fsum, inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qprobe.errors import BudgetError
from qprobe.selection.bound import (
    MOST_LISTS,
    Prospect,
    measured_skiplist,
    parse_bound,
    predicted_skiplist,
    rounded_up,
)
from qprobe.selection.search.damage import Damage
from qprobe.selection.skiplist import SkipList
from tests.runs.runs import inventory_of, linear
from tests.selection.reference import all_skiplists

# Ten layers of one size with attributions 0.1, 0.2, ... 1.0: 5.5 nats in all.
TEN = inventory_of(*(linear(f"l{i}") for i in range(10)), linear("lm_head", fixed="lm_head"))
SCORES = {f"l{i}": (i + 1) / 10 for i in range(10)}
TENTHS = Prospect(TEN, Damage(SCORES, SCORES))


def left(skiplist: SkipList) -> float:
    """What the attributions predict that `skiplist` leaves."""
    return fsum(v for name, v in SCORES.items() if name not in skiplist.kept)


@pytest.mark.parametrize("wrong", [0.0, -1.0, nan, inf])
def test_a_bound_is_a_positive_number(wrong: float):
    with pytest.raises(BudgetError, match=r"no positive number.*--max-kl 0\.01"):
        parse_bound(wrong)
    assert parse_bound(0.01).requested == "max-kl 0.01"


def test_the_predicted_plan_leaves_no_more_than_asked_with_the_fewest_bytes():
    # 1.0 + 0.9 + 0.8 kept leave 2.8 of 5.5; one more is needed for 2.7.
    assert predicted_skiplist(TENTHS, parse_bound(2.8)).kept == ("l7", "l8", "l9")
    skiplist = predicted_skiplist(TENTHS, parse_bound(2.7))
    assert len(skiplist.kept) == 4 and left(skiplist) <= 2.7
    assert predicted_skiplist(TENTHS, parse_bound(5.6)).kept == ()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([16, 64, 100]), st.floats(-0.2, 1)), min_size=1, max_size=9),
    st.floats(0.01, 2),
)
def test_the_predicted_plan_equals_brute_force(layers: list[tuple[int, float]], bound: float):
    inventory = inventory_of(*(linear(f"l{i}", shape=(n, 64)) for i, (n, _) in enumerate(layers)))
    scores = {f"l{i}": score for i, (_, score) in enumerate(layers)}
    total = fsum(scores.values())
    fitting = [size for size, score in all_skiplists(inventory, scores) if total - score <= bound - 1e-9]
    prospect = Prospect(inventory, Damage(scores, scores))
    if fitting:
        skiplist = predicted_skiplist(prospect, parse_bound(bound))
        assert skiplist.total_bytes <= min(fitting) and total - skiplist.score <= bound + 1e-9


def test_isolated_kl_counts_as_in_every_other_prediction():
    # With l0 kept, 0.9 + 0.1 of their own are left, and 4/14 of (1 - 0.9) + (3 - 0.1) between layers: 1.86.
    # Shares that simply add up would have said 4, and kept l2 as well.
    inventory = inventory_of(linear("l0"), linear("l1"), linear("l2"))
    damage = Damage({"l0": 10.0, "l1": 1.0, "l2": 3.0}, {"l0": 7.0, "l1": 0.9, "l2": 0.1})
    skiplist = predicted_skiplist(Prospect(inventory, damage), parse_bound(2.0))
    assert skiplist.kept == ("l0",) and damage.left(frozenset(skiplist.kept)) == pytest.approx(1 + 3 * 4 / 14)


def test_a_bound_that_no_prediction_reaches_says_what_can_be_had():
    # The group of q is never kept, since k has no score; its 0.5 stays.
    inventory = inventory_of(linear("q", "qk"), linear("k", "qk"), linear("a"))
    scores = {"q": 0.5, "a": 1.0}
    with pytest.raises(BudgetError, match=r"KL of 0\.4 or less.*0\.5 is left\. Pass --max-kl 0\.5 or more"):
        predicted_skiplist(Prospect(inventory, Damage(scores, scores)), parse_bound(0.4))


def test_a_prediction_that_measures_true_is_taken_and_then_shortened():
    # Measured is half of what is predicted: 1.0 is met by a list predicted to leave up to 2.0.
    best, tried = measured_skiplist(TENTHS, parse_bound(1.0), lambda skiplist: left(skiplist) / 2)
    assert best is not None and left(best) / 2 <= 1.0 and len(tried) <= MOST_LISTS
    assert left(tried[0]) <= 1.0  # the first list is the predicted one
    assert len(best.kept) == 5  # 1.0 + 0.9 + 0.8 + 0.7 + 0.6 leave 1.5; four would leave 2.1


def test_a_prediction_that_measures_too_high_is_tightened():
    best, tried = measured_skiplist(TENTHS, parse_bound(1.0), lambda skiplist: 2 * left(skiplist))
    assert best is not None and 2 * left(best) <= 1.0 and len(tried) <= MOST_LISTS
    assert 2 * left(tried[0]) > 1.0


def test_a_list_is_measured_once():
    asked: list[SkipList] = []

    def measure(skiplist: SkipList) -> float:
        asked.append(skiplist)
        return left(skiplist)

    best, tried = measured_skiplist(TENTHS, parse_bound(1.05), measure)
    assert asked == tried and len(set(asked)) == len(asked) and best in asked


def test_16_bit_is_no_answer():
    # Whatever is left in 4-bit costs 3 nats; keeping everything is not measured and not taken.
    best, tried = measured_skiplist(TENTHS, parse_bound(0.5), lambda _: 3.0)
    assert best is None and 0 < len(tried) <= MOST_LISTS
    assert all(len(skiplist.kept) < 10 for skiplist in tried)


def test_the_last_list_is_the_most_that_can_be_kept():
    # l0 does not pay, so the richest list leaves it in 4-bit; only that one measures low enough.
    scores = {**SCORES, "l0": -0.1}
    prospect = Prospect(TEN, Damage(scores, scores))
    best, tried = measured_skiplist(prospect, parse_bound(1e-6), lambda p: 0.0 if len(p.kept) == 9 else 1.0)
    assert best is not None and len(best.kept) == 9 and len(tried) <= MOST_LISTS


def test_a_kl_that_is_no_number_is_not_within_the_bound():
    assert measured_skiplist(TENTHS, parse_bound(1.0), lambda _: nan)[0] is None


@given(st.floats(1e-12, 1e6))
def test_the_number_to_type_is_never_too_small(value: float):
    assert value <= float(rounded_up(value)) <= value * 1.011


def test_the_smallest_scores_can_be_asked_for_nothing():
    # The target, 2e-300 - 1, divided by the largest score lies beyond double precision.
    prospect = Prospect(inventory_of(linear("l0")), Damage({"l0": 2e-300}, {"l0": 2e-300}))
    assert predicted_skiplist(prospect, parse_bound(1.0)).kept == ()
