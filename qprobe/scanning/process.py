"""One process of a scan: where it writes, its share, whom it tells, and how long it took; no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qprobe.options import Progress
from qprobe.runs.folder import RunFolder
from qprobe.system.processes import Shard


@dataclass
class Clock:
    """Seconds by stage, added up when a stage is entered more than once."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


@dataclass(frozen=True)
class Process:
    """One process of a scan. run: where it writes; shard: its share of the units."""

    run: RunFolder
    shard: Shard
    progress: Progress
    clock: Clock = field(default_factory=Clock)
