"""How far two units of one stage are from each other."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from qprobe.runs.units import encode_unit, largest_difference, moved_peaks
from tests.runs.runs import output, rows


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of two rows of outputs, beside one that is in both."""
    both = output("a", "model.a", 8.0, 0.5)
    first, second = (encode_unit("outputs", pd.DataFrame([both, x]))[1] for x in (one, other))
    return largest_difference(first, second)


def test_the_difference_is_a_share_of_the_largest_value_of_its_column():
    one = output("b", "model.a", 2.0, 0.1)
    assert difference(one, one) == 0
    assert difference(one, one | {"activation_signal": 3.0}) == 1 / 8  # the largest signal is 8
    assert difference(one, one | {"activation_signal": 3.0, "activation_noise": 0.35}) == pytest.approx(1 / 2)


def test_where_a_peak_was_may_differ_but_not_of_which_layer_it_is():
    one = output("b", "model.a", 2.0, 0.1)
    assert difference(one, one | {"peak_token": 1}) == 0
    assert difference(one, one | {"peak_token": 1, "peak_kind": "vision"}) == 0
    assert difference(one, one | {"peak_kind": "vision", "activation_peak": 1.5}) == 1 / 2
    assert difference(one, one | {"sample": "c"}) == math.inf
    assert difference(one, one | {"layer": "model.b"}) == math.inf


def test_a_number_beside_none_is_no_small_difference():
    one = output("b", "model.a", 2.0, 0.1)
    assert difference(one, one | {"propagated_signal": 2.0}) == math.inf


def test_peaks_at_tokens_of_another_kind_are_counted():
    kinds = [("text", "vision", None), ("text", "answer", "text")]
    frames = [
        pd.DataFrame([output("a", f"l{i}", 1.0, 0.1, peak_kind=x) for i, x in enumerate(unit)])
        for unit in kinds
    ]
    one, other = (encode_unit("outputs", frame)[1] for frame in frames)
    assert moved_peaks(one, other) == 2 and moved_peaks(one, one) == 0
    kl = encode_unit("kl", rows("kl", ("a", "standard", 1, 0.1, 1)))[1]
    assert moved_peaks(kl, kl) == 0
