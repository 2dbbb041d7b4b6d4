"""Lists from each layer's share of the damage and from its isolated KL."""

from __future__ import annotations

from math import fsum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qprobe.errors import BudgetError
from qprobe.records import Inventory
from qprobe.selection.search.damage import Damage, fewest_bytes, least_damage, measured_damage
from qprobe.selection.search.lists import best_skiplist
from qprobe.selection.skiplist import SkipList
from tests.runs.runs import inventory_of, linear

BY = "sensitivity_kl"
NAMES = tuple(f"l{i}" for i in range(14))


def layers(sizes: list[int], group: int) -> Inventory:
    """One linear for each of `sizes`; the first `group` of them move together."""
    return inventory_of(
        *(
            linear(name, group="together" if i < group else None, shape=(size, 64))
            for i, (name, size) in enumerate(zip(NAMES, sizes, strict=False))
        )
    )


tables = st.lists(
    st.tuples(st.sampled_from([16, 64, 100]), st.floats(0, 1), st.floats(-0.3, 1)), min_size=2, max_size=14
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Inventory, Damage, int]:
    """Layers of random sizes, isolated KLs and interactions, and a limit between 4-bit and 16-bit."""
    table = draw(tables)
    inventory = layers([size for size, _, _ in table], draw(st.integers(0, 4)))
    names = [x.name for x in inventory.layers]
    isolated = dict(zip(names, (own for _, own, _ in table), strict=True))
    path = {n: isolated[n] + more for n, (_, _, more) in zip(names, table, strict=True)}
    most = inventory.total_bytes(frozenset(names))
    return inventory, Damage(path, isolated), draw(st.integers(inventory.standard_4bit_bytes, most))


def test_layers_that_make_up_for_each_other_are_kept_by_what_each_costs_alone():
    path, isolated = {"l0": 0.5, "l1": 0.3, "l2": 0.2}, {"l0": 1.0, "l1": 3.0, "l2": 4.0}
    inventory = layers([64, 64, 64], 0)
    one = inventory.standard_4bit_bytes + inventory.layers[0].bytes_16bit - inventory.layers[0].bytes_4bit
    # By the formula with all interactions any layer in 16-bit makes it worse.
    assert least_damage(inventory, Damage(path, isolated), one, BY).kept == ()
    damage = measured_damage(path, isolated)
    found = least_damage(inventory, damage, one, BY)
    assert found.kept == ("l2",) and found.score == pytest.approx(0.5)
    assert damage.left(frozenset()) == pytest.approx(1.0)
    assert measured_damage(path, {"l0": 0.5, "l1": 0.5, "l2": 0.9}) == Damage(
        path, {"l0": 0.5, "l1": 0.5, "l2": 0.9}
    )
    assert measured_damage({"l0": -1.0}, {"l0": 1.0}) == Damage({"l0": -1.0}, {"l0": 1.0})


def test_all_layers_in_4bit_cost_the_sum_of_their_shares_and_none_costs_nothing():
    damage = Damage({"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 0.5})
    assert damage.left(frozenset()) == 4.0
    assert damage.left(frozenset(("a", "b"))) == 0.0
    # b kept: 1.0 of its own, and 3/4 of what lies between a and the others, 0.75 x (3.0 - 1.0)
    assert damage.left(frozenset(("b",))) == 1.0 + 0.75 * 2.0


def test_marginal_damage_is_the_own_one_at_the_16bit_end_and_the_share_halfway():
    damage = Damage({"a": 3.0}, {"a": 1.0})
    assert damage.marginal(0.0) == {"a": 1.0}
    assert damage.marginal(0.5) == {"a": 3.0}
    assert damage.marginal(1.0) == {"a": 5.0}  # 2 x 3 - 1: the row and the column of the curvature


def test_a_layer_that_hurts_only_beside_the_worst_one_is_not_kept_once_that_is():
    # Three layers of one size, room for two. c has the second largest share, but nearly all of it is between
    # c and a; with a kept, b's isolated KL is what is left to save.
    inventory = layers([64, 64, 64], 0)
    damage = Damage(dict(zip(NAMES, (10.0, 1.0, 3.0), strict=False)),
                    dict(zip(NAMES, (7.0, 0.9, 0.1), strict=False)))  # fmt: skip
    room = inventory.total_bytes(frozenset(NAMES[:2]))
    assert best_skiplist(inventory, damage.path, room, BY).kept == ("l0", "l2")
    assert least_damage(inventory, damage, room, BY).kept == ("l0", "l1")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_list_by_either_score_alone_is_predicted_to_be_better(case: tuple[Inventory, Damage, int]):
    inventory, damage, limit = case
    skiplist = least_damage(inventory, damage, limit, BY)
    assert skiplist.total_bytes <= limit
    assert skiplist.total_bytes == inventory.total_bytes(frozenset(skiplist.kept))
    for scores in (damage.path, damage.isolated):
        other = best_skiplist(inventory, scores, limit, BY)
        assert damage.left(frozenset(skiplist.kept)) <= damage.left(frozenset(other.kept)) + 1e-12
    assert damage.left(frozenset(skiplist.kept)) <= damage.left(frozenset()) + 1e-12
    together = {x.name for x in inventory.layers if x.group == "together"}
    assert together <= set(skiplist.kept) or not together & set(skiplist.kept)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(cases())
def test_without_interactions_the_list_is_the_exact_one(case: tuple[Inventory, Damage, int]):
    inventory, damage, limit = case
    plain = Damage(damage.isolated, damage.isolated)
    exact = best_skiplist(inventory, damage.isolated, limit, BY)
    skiplist = least_damage(inventory, plain, limit, BY)
    assert skiplist.score == pytest.approx(exact.score, abs=1e-9)
    left = fsum(v for n, v in damage.isolated.items() if n not in skiplist.kept)
    assert plain.left(frozenset(skiplist.kept)) == pytest.approx(left, abs=1e-9)


def test_a_limit_below_standard_4bit_is_refused():
    with pytest.raises(BudgetError, match="below standard 4-bit"):
        least_damage(layers([64, 64], 0), Damage({"l0": 1.0}, {"l0": 1.0}), 100, BY)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(0.001, 1))
def test_the_fewest_bytes_meet_the_bound_and_no_smaller_limit_does(
    case: tuple[Inventory, Damage, int], share: float
):
    inventory, damage, _ = case
    bound = share * damage.left(frozenset())
    skiplist = fewest_bytes(inventory, damage, bound, BY)
    everything = inventory.total_bytes(frozenset(x.name for x in inventory.layers))
    richest = least_damage(inventory, damage, everything, BY)
    if skiplist is None:
        assert damage.left(frozenset(richest.kept)) > bound
        return
    assert damage.left(frozenset(skiplist.kept)) <= bound
    assert skiplist.total_bytes == inventory.total_bytes(frozenset(skiplist.kept))
    smaller = skiplist.total_bytes - 1
    if smaller >= inventory.standard_4bit_bytes and not damage.is_additive:
        assert damage.left(frozenset(least_damage(inventory, damage, smaller, BY).kept)) > bound


def test_where_nothing_needs_to_be_kept_the_list_is_empty_and_scores_nothing():
    inventory = inventory_of(linear("a"), linear("b"))
    shares = {"a": 1.0, "b": 1.0}
    for own in (shares, {"a": 0.5, "b": 0.1}):
        found = fewest_bytes(inventory, Damage(shares, own), 2.0, "x")
        assert found == SkipList((), inventory.standard_4bit_bytes, 0.0, "x")
