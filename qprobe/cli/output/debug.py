"""QPROBE_DEBUG=1: the traceback of an error that otherwise is one sentence, and the time of each stage."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import click

from qprobe.cli.output.speaking import say
from qprobe.options import Progress

VARIABLE = "QPROBE_DEBUG"


def is_on() -> bool:
    """True if QPROBE_DEBUG is set, to anything but 0."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


@contextmanager
def debugged() -> Iterator[None]:
    """Prints the traceback of an error that leaves the block on stderr, and how long the block took."""
    start = perf_counter()
    try:
        yield
    except (click.ClickException, click.exceptions.Exit):  # said in full already
        raise
    except Exception:
        if is_on():
            say(traceback.format_exc(), err=True)
        raise
    finally:
        if is_on():
            _say("all of it", perf_counter() - start)


@contextmanager
def stage_times(show: Progress) -> Iterator[Progress]:
    """`show`; at the end the seconds of each stage, up to the first call of the next one, go to stderr."""
    if not is_on():
        yield show
        return
    clock = _StageClock(show)
    try:
        yield clock
    finally:
        clock.stop()
        for stage, spent in clock.seconds.items():
            _say(stage, spent)


class _StageClock:
    """A `Progress` that adds up the seconds of each stage and hands on what it is told."""

    def __init__(self, show: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._show = show
        self._stage, self._begun = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.stop()
            self._stage, self._begun = stage, perf_counter()
        self._show(stage, done, total)

    def stop(self) -> None:
        """Ends the stage that runs."""
        if self._stage:
            spent = perf_counter() - self._begun
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + spent
        self._stage = ""


def _say(what: str, seconds: float) -> None:
    say(f"{VARIABLE}: {seconds:10.3f} s  {what}", err=True)
