"""A bound on processor time holds if it holds once, and fails if it never does."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from tests.timed import TRIES, least


def spend(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def spending(*seconds: float) -> tuple[Callable[[], None], list[float]]:
    """(work that takes these in turn, those that are left)."""
    left = list(seconds)
    return lambda: spend(left.pop(0)), left


def test_one_time_below_the_bound_is_enough_and_is_the_last():
    work, left = spending(0.05, 0.001, 9.0)
    assert 0.001 <= least(work, 0.04) < 0.04 and left == [9.0]


def test_work_that_is_always_slow_stays_above_the_bound():
    work, left = spending(*[0.02] * TRIES, 9.0)
    assert least(work, 0.01) >= 0.02 and left == [9.0]


def test_time_of_a_process_that_was_started_counts_where_that_is_asked_for():
    code = "import time\nwhile time.process_time() < 0.1: pass"
    assert (
        least(lambda: subprocess.run([sys.executable, "-c", code], check=True), 0.0, of_children=True) > 0.1
    )
