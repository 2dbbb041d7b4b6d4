"""Progress bars: one per stage, in a terminal and in a notebook; nothing elsewhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qprobe.options import Progress, no_progress


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A `Progress` that draws one bar per stage, on stderr or as a notebook's widget.

    Silent where stderr is no terminal and no notebook with widgets shows it. Bars are removed at the end.
    """
    make = _bar_class()
    if make is None:
        yield no_progress
        return
    bars: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            _close(bars)
            bars[stage] = make(total=total, desc=stage, leave=False, dynamic_ncols=True, file=sys.stderr)
        bar = bars[stage]
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        _close(bars)


def _bar_class() -> Any | None:
    """tqdm's class for where this runs; None where nobody would see it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook without widgets tqdm asks to install them
        from tqdm import auto
    is_widget = any(x.__module__ == "tqdm.notebook" for x in auto.tqdm.__mro__)
    return auto.tqdm if is_widget or sys.stderr.isatty() else None


def _close(bars: dict[str, Any]) -> None:
    for bar in bars.values():
        bar.close()
