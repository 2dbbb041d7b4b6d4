"""The study of starts pairs what it compares: samples for the KL, lines for the losses."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest

from tests.benchmarks.starts.report import paired, report, share


def curve(before: list[float], after: list[float]) -> list[Any]:
    return [[0, before], [20, after]]


FOUND = {
    "model": "m",
    "base": "calibrated",
    "tokens": [10, 10],
    "kl": {"zero": [2.0, 4.0], "loftq": [2.0, 4.0], "corrected": [1.8, 3.6], "distilled": [1.0, 2.0]},
    "losses": {
        "zero": [curve([1.0, 2.0], [1.0, 2.0]), curve([1.0, 2.0], [1.0, 2.0])],
        "loftq": [curve([1.0, 2.0], [1.0, 2.0]), curve([1.0, 2.0], [1.0, 2.0])],
        "corrected": [curve([0.5, 1.5], [1.3, 2.1]), curve([0.5, 1.5], [1.1, 2.3])],
        "distilled": [curve([0.5, 1.5], [1.1, 2.1]), curve([0.5, 1.5], [1.1, 2.1])],
    },
    "distilled": [7, 0.2, 0.1],
    "seconds": 1.0,
    "made_with": "a machine",
}


def test_a_share_pools_samples_and_has_no_error_where_each_has_the_same():
    value, error = share(FOUND["kl"], "corrected")
    assert value == pytest.approx(0.9) and error == pytest.approx(0.0, abs=1e-12)
    value, error = share({"zero": [2.0, 4.0], "x": [1.0, 4.0]}, "x")
    # 5 / 6; residuals 1 - 5/3 and 4 - 10/3, so sqrt(2 * (4/9 + 4/9)) / 6
    assert value == pytest.approx(5 / 6) and error == pytest.approx(sqrt(16 / 9) / 6)


def test_differences_are_averaged_over_seeds_before_their_error_is_taken_over_lines():
    zero = FOUND["losses"]["zero"]
    # By line (0.3 + 0.1) / 2 and (0.1 + 0.3) / 2: the seeds differ, the lines do not.
    assert paired(FOUND["losses"]["corrected"], zero, 1) == pytest.approx((0.2, 0.0), abs=1e-12)
    uneven = [curve([0, 0], [1.0, 2.4])]
    assert paired(uneven, zero[:1], 1) == pytest.approx((0.2, 0.2))  # lines 0.0 and 0.4: sd 0.283 / sqrt 2


def test_marks_and_starts_that_end_worse_are_said():
    text = report([FOUND], "the command")
    assert "Mark of corrected on the calibrated base, at most 0.85: 0.900 ± 0, missed." in text
    assert "Mark of distilled on the calibrated base, at most 0.65: 0.500 ± 0, kept." in text
    assert "Ended worse than zero by more than two errors: corrected on calibrated (+0.2000" in text
    assert "| calibrated | 0.3 ± " in text and "7: 0.2 to 0.1" in text
