"""A command in a process of its own: what it printed, how long it took, the most memory it held.

    python tests/alone.py RESULT LIMIT COMMAND...

is the small process between. A process begins with the peak of the one that started it, and whoever measures
is large: pytest, or a benchmark that has torch.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Alone:
    """A process that ended. status: its exit code; None if it was killed for taking too long.

    peak_bytes: the most that was resident in it, or in one of those that it started and waited for.
    """

    status: int | None
    out: str
    err: str
    seconds: float
    peak_bytes: int


def run_alone(
    command: Sequence[str], limit_s: float = 3600, environment: Mapping[str, str] | None = None
) -> Alone:
    """Run `command`; after `limit_s` seconds it is killed, with all processes that it started."""
    with tempfile.TemporaryDirectory() as folder:
        result, out, err = (Path(folder) / name for name in ("result", "out", "err"))
        between = [sys.executable, __file__, str(result), str(limit_s), *command]
        with open(out, "wb") as to_out, open(err, "wb") as to_err:
            subprocess.run(between, stdout=to_out, stderr=to_err, env=environment, check=True)
        said = (path.read_bytes().decode(errors="replace") for path in (out, err))
        status, seconds, peak = json.loads(result.read_text())
        return Alone(status, *said, seconds, peak)


def _between(result: str, limit: str, *command: str) -> None:
    start = time.perf_counter()
    process = subprocess.Popen(command)
    status = None
    try:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(float(limit))
    finally:
        _end(process)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    Path(result).write_text(json.dumps([status, time.perf_counter() - start, peak]))


def _end(process: subprocess.Popen) -> None:
    """Kill what still runs of it: by descent, since torchrun gives each worker a session of its own."""
    if process.poll() is None:
        tree = psutil.Process(process.pid).children(recursive=True)
        process.kill()  # first: it could start more
        for one in tree:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


if __name__ == "__main__":
    _between(*sys.argv[1:])
