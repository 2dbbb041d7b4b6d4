"""Laws of the exact knapsack."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qprobe.selection.search import knapsack as module
from qprobe.selection.search.knapsack import knapsack
from tests.selection.reference import best_value
from tests.timed import least

# Multiples of a block make equal sums likely, odd bytes make them rare, and zero costs nothing.
costs = st.one_of(st.integers(0, 12).map(lambda n: n * 97264), st.integers(0, 10**11))
values = st.one_of(st.floats(-1, 10), st.sampled_from([0.0, 0.1, 0.1, 1.0]), st.floats(1e-9, 1e-6))
tables = st.lists(st.tuples(costs, values), max_size=12)


def total(items: list, chosen: tuple[int, ...]) -> float:
    return sum(items[i] for i in chosen)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(tables, st.floats(0, 1.1))
def test_choice_is_within_the_limit_and_as_good_as_any(table: list[tuple[int, float]], share: float):
    cost, value = [c for c, _ in table], [v for _, v in table]
    limit = int(sum(cost) * share)
    chosen = knapsack(cost, value, limit)
    assert total(cost, chosen) <= limit
    assert total(value, chosen) == pytest.approx(best_value(cost, value, limit), rel=1e-9, abs=1e-15)
    assert list(chosen) == sorted(set(chosen)) and all(value[i] > 0 for i in chosen)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(tables, st.integers(0, 10**12), st.integers(0, 10**12))
def test_more_budget_never_scores_worse(table: list[tuple[int, float]], a: int, b: int):
    cost, value = [c for c, _ in table], [v for _, v in table]
    small, large = (total(value, knapsack(cost, value, limit)) for limit in sorted((a, b)))
    assert large >= small * (1 - 1e-11)


@pytest.mark.slow
def test_scores_that_follow_their_bytes_are_as_exact():
    # The hard case: the linear bound is close to every choice, so one a little too tight would lose the best.
    rng = np.random.default_rng(1)
    for _ in range(60):
        cost = [int(c) for c in rng.integers(50, 100, 11)]
        value = [c * float(x) for c, x in zip(cost, rng.uniform(0.95, 1.05, 11), strict=True)]
        limit = sum(cost) // 2
        assert total(value, knapsack(cost, value, limit)) == pytest.approx(
            best_value(cost, value, limit), rel=1e-12
        )


def test_greedy_by_value_per_cost_would_lose():
    # Per cost item 0 is best (1.0), but leaves 4 unused; the other two fill 10 and are worth 9.5.
    assert knapsack([6, 5, 5], [6.0, 4.75, 4.75], 10) == (1, 2)


def test_a_limit_missed_by_one_byte_is_missed():
    big = 10**11
    assert knapsack([big, big + 1], [1.0, 2.0], big) == (0,)
    assert knapsack([big + 1, big + 2], [1.0, 1.0], 2 * big + 2) == (0,)


def test_what_costs_nothing_is_always_taken_and_what_is_worth_nothing_never():
    assert knapsack([0, 5, 5, 0], [1e-30, 1.0, 2.0, -1.0], 5) == (0, 2)
    assert knapsack([3], [0.0], 10) == ()
    assert knapsack([], [], 0) == ()


def real_costs(rng: np.random.Generator) -> list[int]:
    """Extra bytes in 16-bit of 600 layers with shapes of an 11B model."""
    shapes = [2**24, 2**22, 14336 * 4096, 1280 * 1280, 1280 * 5120, 7680 * 4096]
    return [int(n) * 6079 // 4096 for n in rng.choice(shapes, 600)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spread", "follows bytes", "equals bytes", "equal"])
def test_600_layers_take_less_than_two_seconds_and_reach_the_linear_bound(kind: str):
    rng = np.random.default_rng(3)
    cost = real_costs(rng)
    value = {
        "spread": [c * float(x) for c, x in zip(cost, rng.lognormal(0, 2, 600), strict=True)],
        "follows bytes": [c * float(x) for c, x in zip(cost, rng.uniform(0.9, 1.1, 600), strict=True)],
        "equals bytes": [float(c) for c in cost],
        "equal": [1.0] * 600,
    }[kind]
    limit = sum(cost) // 10
    assert least(lambda: knapsack(cost, value, limit), 2) < 2
    chosen = knapsack(cost, value, limit)
    # The linear relaxation is at most one item better than the best whole choice.
    order = sorted(range(600), key=lambda i: -value[i] / cost[i])
    bound, room = 0.0, limit
    for i in order:
        bound += value[i] * min(1.0, room / cost[i])
        room -= min(room, cost[i])
    score = total(value, chosen)
    assert total(cost, chosen) <= limit
    assert bound - max(value) <= score <= bound * (1 + 1e-12)


def test_too_many_partial_choices_cost_exactness_but_neither_time_nor_the_limit(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "_MOST_STATES", 50)
    rng = np.random.default_rng(4)
    cost = [int(c) for c in rng.integers(10**9, 10**11, 300)]
    value = [float(c) for c in cost]
    limit = sum(cost) // 7
    chosen = knapsack(cost, value, limit)
    assert limit * 0.99 < total(cost, chosen) <= limit


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(5)
    cost = real_costs(rng)
    knapsack(
        cost, [c * float(x) for c, x in zip(cost, rng.uniform(0.9, 1.1, 600), strict=True)], sum(cost) // 20
    )
    assert capfd.readouterr() == ("", "")
