"""JSON of others: what fits a type becomes it, what does not is named to the key."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe.system.decoding import decode, strict_json


@dataclass(frozen=True)
class Part:
    name: str
    shape: tuple[int, int]
    share: float | None
    kind: Literal["a", "b"] = "a"
    later: int | None = None


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    sums: dict[str, float] = field(default_factory=dict)
    done: bool = False


WHOLE = Whole((Part("x", (2, 3), None), Part("y", (4, 5), 0.5, "b", 7)), {"s": 1.5}, True)


def plain() -> dict[str, Any]:
    return json.loads(json.dumps(asdict(WHOLE)))


def test_what_was_written_comes_back():
    assert decode(Whole, plain(), "it") == WHOLE


def test_a_key_whose_default_is_none_may_be_missing():
    data = plain()
    del data["parts"][0]["later"]
    assert decode(Whole, data, "it") == WHOLE


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["parts", 0, "shape", 1], "3", r"it.parts[0].shape[1] is 3 (expected `int`, got `str`)"),
        (["parts", 0, "shape", 1], 3.0, r"it.parts[0].shape[1] is 3.0 (expected `int`, got `float`)"),
        (["parts", 0, "shape", 1], True, r"it.parts[0].shape[1] is true (expected `int`, got `bool`)"),
        (["parts", 0, "shape"], [1], r"it.parts[0].shape is [1] (expected `array` of length 2, got 1)"),
        (["parts", 1, "share"], "x" * 99,
         f"it.parts[1].share is {'x' * 57}... (expected `float | null`, got `str`)"),
        (["parts", 1, "kind"], "c", r"it.parts[1].kind is c (invalid enum value 'c')"),
        (["parts"], {}, r"it.parts is {} (expected `array`, got `object`)"),
        (["sums", "s"], "x", r"it.sums[...] is wrong (expected `float`, got `str`)"),
        (["done"], 1, r"it.done is 1 (expected `bool`, got `int`)"),
        (["more"], 1, r"it has the unknown more"),
        (["parts", 1, "more"], 1, r"it.parts[1] has the unknown more"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_to_the_key(path: list[str | int], value: Any, said: str):
    data = plain()
    place: Any = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ValueError) as caught:
        decode(Whole, data, "it")
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("path", "key"), [([], "parts"), ([], "sums"), (["parts", 1], "name"), (["parts", 1], "kind")]
)
def test_a_missing_key_is_named(path: list[Any], key: str):
    data = plain()
    place: Any = data
    for step in path:
        place = place[step]
    del place[key]
    where = "it" if not path else "it.parts[1]"
    with pytest.raises(ValueError) as caught:
        decode(Whole, data, "it")
    assert str(caught.value) == f"{where} lacks {key}"


def test_a_value_that_is_no_object_is_named():
    with pytest.raises(ValueError) as caught:
        decode(Whole, 3, "it")
    assert str(caught.value) == "it is 3 (expected `object`, got `int`)"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(value=VALUES, place=st.sampled_from(["parts", "sums", "done", "kind", "shape", "all"]))
def test_no_value_raises_anything_but_a_value_error(value: Any, place: str):
    data = plain()
    if place in ("kind", "shape"):
        data["parts"][0][place] = value
    else:
        data[place] = value
    try:
        decode(Whole, value if place == "all" else data, "it")
    except ValueError as error:
        assert str(error).startswith("it")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"-Infinity", "-Infinity is no JSON number"),
        (b"1e400", "the number 1e400 is too large"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice in one object"),
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff", "utf-8"),
        (b"1" * 10_000, "digits"),
    ],
)
def test_json_that_others_let_pass_is_refused(data: bytes, said: str):
    with pytest.raises(ValueError, match=said):
        strict_json(data)
