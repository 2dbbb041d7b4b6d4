"""Entries that are exactly right for every reader, or an error that names what is wrong."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe.errors import ManifestError
from qprobe.exports import matchers
from qprobe.exports.keys import (
    Reader,
    check_entries,
    exact,
    exact_entries,
    one_pattern,
    transformers_4_readers,
    transformers_readers,
)
from tests.exports.manifests import manifest_of

AWKWARD = ("proj", "a.proj", "a.b", "aXb", "layers.1.fc", "layers.11.fc", "layers.1", "layers.10", "fc")


@pytest.mark.slow
@given(st.sets(st.sampled_from(AWKWARD)))
def test_any_choice_among_awkward_names_is_exact_under_both_rules_of_transformers_5(kept: set[str]):
    manifest = manifest_of({name: name in kept for name in AWKWARD})
    readers = transformers_readers(manifest)
    entries = exact_entries(readers, str, exact)
    for rule in (matchers.transformers_5_0, matchers.transformers_5_21):
        assert {n for n in AWKWARD for e in entries if rule(e, n)} == kept


def test_plain_names_are_used_where_they_are_exact():
    names = {"layers.2.fc": True, "layers.3.fc": False}
    assert exact_entries(transformers_readers(manifest_of(names)), str, exact) == ["layers.2.fc"]
    # Under 5.0 "layers.1" would keep layers.10 as well: now every entry is anchored.
    longer = transformers_readers(manifest_of({"layers.1": True, "layers.10": False}))
    assert exact_entries(longer, str, exact) == [exact("layers.1")]


def test_transformers_4_cannot_tell_a_leaf_from_its_namesakes():
    # Its rule takes a listed last part for every module that ends in it, and has no patterns to prevent that.
    readers = transformers_4_readers(manifest_of({"fc": True, "a.fc": False}))
    with pytest.raises(
        ManifestError, match=r"the entry 'fc' keeps 2 layers in 16-bit, 1 of them unwanted.*a\.fc"
    ):
        exact_entries(readers, str)


PARTS = st.sampled_from(["a", "b", "ab", "1", "11", "2"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@pytest.mark.slow
@given(st.dictionaries(NAMES, st.booleans(), max_size=12))
def test_one_pattern_matches_exactly_its_names(names: dict[str, bool]):
    chosen = [name for name, is_chosen in names.items() if is_chosen]
    if chosen:
        assert [n for n in names if re.fullmatch(one_pattern(chosen), n)] == chosen


def test_one_pattern_writes_layers_with_the_same_numbers_once():
    names = [f"m.layers.{i}.{leaf}" for i in range(3) for leaf in ("q_proj", "mlp.up")]
    assert one_pattern(["head", *names]) == r"head|m\.layers\.(?:0|1|2)(?:\.q_proj|\.mlp\.up)"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], r"the empty list does not name a, so 1 layer that"),
        (["c"], r"the only entry does not match a, so 1 layer that"),
        (["a", "c"], r"The entry 'c' matches no linear layer under one"),
        (["a", "b"], r"Under one the entry 'b' keeps 1 layer in 16-bit, 1 of them unwanted, first b;"),
    ],
)
def test_what_a_check_says(entries, said):
    reader = Reader("one", lambda entry, name: entry == name, {"a": True, "b": False})
    with pytest.raises(ManifestError, match=said):
        check_entries(entries, [reader])
    check_entries(["a"], [reader])


def test_an_entry_may_serve_one_reader_only():
    readers = [
        Reader("old", lambda e, n: e == n, {"old.a": True}),
        Reader("new", lambda e, n: e == n, {"new.a": True}),
    ]
    check_entries(["old.a", "new.a"], readers)
