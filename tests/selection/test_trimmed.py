"""Parts of a skip-list without layers of which little is expected."""

from __future__ import annotations

from math import fsum

from hypothesis import given, settings
from hypothesis import strategies as st

from qprobe.selection.search.lists import best_skiplist
from qprobe.selection.trimmed import WORTH, trimmed
from tests.runs.runs import inventory_of, linear
from tests.selection.reference import all_skiplists

NAMES = tuple(f"l{i}" for i in range(9))
layers = st.lists(
    st.tuples(st.sampled_from([16, 64, 100]), st.floats(-0.3, 1).map(lambda x: x**3)), min_size=1, max_size=9
)


def test_half_of_what_is_given_away_comes_back_whole_groups_by_return_for_their_bytes():
    # Of the groups a (two layers, 2 for their bytes), b (1.5) and c (1) the first one comes back.
    group = {"l1": "a", "l2": "a"}
    inventory = inventory_of(*(linear(name, group.get(name)) for name in NAMES[:5]))
    returns = {"l0": 1000.0, "l1": 2.0, "l2": 2.0, "l3": 1.5, "l4": 1.0}
    everything = inventory.total_bytes(frozenset(returns))
    found = trimmed(inventory, returns, best_skiplist(inventory, returns, everything, "by"))
    assert found["trimmed"].kept == ("l0",) and found["half trimmed"].kept == ("l0", "l1", "l2")
    assert found["half trimmed"].total_bytes == inventory.total_bytes(frozenset(("l0", "l1", "l2")))
    assert found["half trimmed"].score == 1004.0 and found["trimmed"].by == "by"


def test_of_equal_layers_none_is_given_away():
    inventory = inventory_of(*map(linear, NAMES[:4]))
    returns = dict.fromkeys(NAMES[:4], 0.5)
    whole = best_skiplist(inventory, returns, inventory.total_bytes(frozenset(returns)), "by")
    assert {name: x.kept for name, x in trimmed(inventory, returns, whole).items()} == {"trimmed": NAMES[:4]}


@settings(max_examples=60, deadline=None)
@given(layers, st.integers(0, 3), st.floats(0, 1))
def test_the_part_is_the_smallest_that_is_worth_as_much(
    table: list[tuple[int, float]], together: int, room: float
):
    shapes = zip(NAMES, (size for size, _ in table), strict=False)
    inventory = inventory_of(
        *(linear(n, "g" if i < together else None, (size, 64)) for i, (n, size) in enumerate(shapes))
    )
    scores = dict(zip(NAMES, (score for _, score in table), strict=False))
    standard = inventory.standard_4bit_bytes
    limit = standard + int(room * (inventory.total_bytes(frozenset(scores)) - standard))
    whole = best_skiplist(inventory, scores, limit, "by")
    returns = {name: scores[name] for name in whole.kept}
    found = trimmed(inventory, returns, whole)
    target = WORTH * fsum(returns.values())
    enough = [size for size, score in all_skiplists(inventory, returns) if score >= target + 1e-9]
    assert all(found["trimmed"].total_bytes <= size for size in enough)
    half = found.get("half trimmed", found["trimmed"])
    for less in (found["trimmed"], half):
        assert set(found["trimmed"].kept) <= set(less.kept) <= set(whole.kept)
        assert fsum(returns[name] for name in less.kept) >= target - 1e-9
        assert len({x.name in less.kept for x in inventory.layers if x.group == "g"}) <= 1
