"""Laws of choosing layers."""

from collections.abc import Sequence
from itertools import pairwise, product
from math import fsum, inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qprobe.errors import BudgetError
from qprobe.records import Inventory, Linear
from qprobe.selection.search.lists import best_skiplist, best_skiplists, smallest_skiplist
from qprobe.selection.search.solver import Item, Option, fewest_bytes, least_damage, most_spared
from tests.runs.runs import inventory_of, linear
from tests.selection.reference import all_skiplists

Case = tuple[Inventory, dict[str, float]]

shapes = st.tuples(st.sampled_from([1, 2, 16, 64, 100]), st.sampled_from([2, 64, 96, 128]))
score = st.one_of(st.floats(-0.5, 3), st.sampled_from([nan, inf, 0.0, 0.25, 1.0]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 14 layers, some grouped, some fixed, some without a score."""
    count = draw(st.integers(0, 14))
    layers: list[Linear] = []
    for i in range(count):
        group = draw(st.sampled_from([None, None, "g1", "g2", "g3"]))
        fixed = draw(st.sampled_from([None] * 8 + ["lm_head", "tied"]))
        layers.append(linear(f"l{i}", group, draw(shapes), fixed=fixed))
    scores = {x.name: draw(score) for x in layers if draw(st.integers(0, 9))}
    return inventory_of(*layers), scores


def limit_at(inventory: Inventory, share: float) -> int:
    most = inventory.total_bytes(frozenset(x.name for x in inventory.layers))
    return inventory.standard_4bit_bytes + int(share * max(0, most - inventory.standard_4bit_bytes))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(cases(), st.floats(0, 1.2))
def test_plan_is_within_budget_and_as_good_as_any(case: Case, share: float):
    inventory, scores = case
    limit = limit_at(inventory, share)
    skiplist = best_skiplist(inventory, scores, limit, "m")
    assert skiplist.total_bytes <= limit
    assert skiplist.total_bytes == inventory.total_bytes(frozenset(skiplist.kept))
    best = max(value for size, value in all_skiplists(inventory, scores) if size <= limit)
    assert skiplist.score == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(cases(), st.floats(0, 1.2))
def test_groups_move_whole_and_only_layers_with_a_score_move(case: Case, share: float):
    inventory, scores = case
    kept = set(best_skiplist(inventory, scores, limit_at(inventory, share), "m").kept)
    for layer in inventory.layers:
        partners = {x.name for x in inventory.layers if x.group == layer.group and x.fixed is None}
        assert layer.fixed is None or layer.name not in kept
        if layer.name in kept:
            assert partners <= kept
            assert all(abs(scores[name]) < inf for name in partners)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(cases(), st.lists(st.floats(0, 1.2), min_size=2, max_size=5))
def test_the_frontier_rises_with_the_budget(case: Case, shares: list[float]):
    inventory, scores = case
    budgets = [limit_at(inventory, share) for share in sorted(shares)]
    skiplists = best_skiplists(inventory, scores, budgets, "m")
    assert [p.total_bytes <= b for p, b in zip(skiplists, budgets, strict=True)] == [True] * len(budgets)
    for smaller, larger in pairwise(skiplists):
        assert larger.score >= smaller.score * (1 - 1e-11)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(cases(), st.floats(0, 1))
def test_cheapest_reaches_its_target_with_the_fewest_bytes(case: Case, share: float):
    inventory, scores = case
    skiplists = all_skiplists(inventory, scores)
    most = max(value for _, value in skiplists)
    target = share * most
    skiplist = smallest_skiplist(inventory, scores, target, "m")
    assert skiplist.score >= target - 1e-11 * most
    assert skiplist.total_bytes <= min(size for size, value in skiplists if value >= target)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(0, 1.2))
def test_cheapest_for_the_score_of_a_plan_costs_no_more_than_the_plan(case: Case, share: float):
    inventory, scores = case
    skiplist = best_skiplist(inventory, scores, limit_at(inventory, share), "m")
    assert smallest_skiplist(inventory, scores, skiplist.score, "m").total_bytes <= skiplist.total_bytes


def test_a_target_out_of_reach_is_refused_with_what_can_be_had():
    inventory = inventory_of(linear("a"), linear("b"))
    with pytest.raises(BudgetError, match=r"score 0\.75 by m, less than the 0\.8 asked"):
        smallest_skiplist(inventory, {"a": 0.25, "b": 0.5}, 0.8, "m")


def test_the_smallest_score_there_is_can_be_asked_for():
    # 2**-1074 has no 2**-44th part; it once ended in a division by zero
    inventory = inventory_of(linear("a"), linear("b"))
    assert smallest_skiplist(inventory, {"a": 5e-324, "b": 0.0}, 5e-324, "m").kept == ("a",)


def test_a_group_with_an_unmeasured_layer_stays_in_4_bit():
    inventory = inventory_of(linear("q", "qk"), linear("k", "qk"), linear("a"))
    assert best_skiplist(inventory, {"q": 9.0, "a": 0.1}, 10**6, "m").kept == ("a",)
    assert best_skiplist(inventory, {"q": 9.0, "k": nan, "a": 0.1}, 10**6, "m").kept == ("a",)


def test_a_harmless_layer_moves_with_its_damaged_group():
    inventory = inventory_of(linear("q", "qk"), linear("k", "qk"))
    skiplist = best_skiplist(inventory, {"q": 9.0, "k": -1.0}, 10**6, "m")
    assert (skiplist.kept, skiplist.score) == (("q", "k"), 8.0)


def test_a_limit_below_standard_4_bit_is_refused():
    inventory = inventory_of(linear("a"), other_bytes=0)  # 64 * 64 weights: 2,048 + 64 + 4 bytes in NF4
    with pytest.raises(BudgetError, match=r"2,115 bytes.*2,116 bytes"):
        best_skiplist(inventory, {}, 2115, "m")
    assert best_skiplist(inventory, {"a": 1.0}, 2116, "m").kept == ()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(-5, 60), st.floats(-1, 3)), max_size=9), st.data())
def test_items_take_the_options_that_do_the_least_damage(given_items: list[tuple[int, int, float]], data):
    # (bytes of the first option, what the second costs more, what it spares), tried in all ways
    items = [
        Item((str(i),), (Option(first, gain), Option(first + max(more, -first), 0.0)))
        for i, (first, more, gain) in enumerate(given_items)
    ]
    least = sum(x.options[0].size_bytes for x in items)
    limit = least + data.draw(st.integers(0, 200))
    taken = least_damage(items, limit)

    def both(numbers: Sequence[int]) -> tuple[int, float]:
        pairs = [(x.options[0], x.options[i]) for x, i in zip(items, numbers, strict=True)]
        # What is spared is added up itself: a difference of sums would lose the smallest gains.
        return sum(x.size_bytes for _, x in pairs), fsum(x.damage - y.damage for x, y in pairs)

    # The second option only where it spares something, even if it is the smaller one.
    ways = [both(numbers) for numbers in product(*((0, 1) if gain > 0 else (0,) for *_, gain in given_items))]
    assert both(taken)[0] <= limit
    assert both(taken)[1] >= max(spared for size, spared in ways if size <= limit) - 1e-9
    spared = most_spared(items) * data.draw(st.floats(0, 1))
    size, found = both(fewest_bytes(items, spared))
    assert found >= spared - 1e-9
    assert size <= min(s for s, gained in ways if gained >= spared)
