"""Processor time against a bound, on machines that others use as well: caches and cores are shared."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

TRIES = 3


def least(work: Callable[[], object], bound_s: float, of_children: bool = False) -> float:
    """The fewest processor seconds that `work` took, of at most `TRIES` times; one below `bound_s` ends it.

    What runs beside it makes work seem to take longer, never shorter. of_children: of the processes that it
    started and waited for, instead of its own.
    """
    clock = _of_children if of_children else time.process_time
    found: list[float] = []
    while len(found) < TRIES and (not found or min(found) >= bound_s):
        start = clock()
        work()
        found.append(clock() - start)
    return min(found)


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
