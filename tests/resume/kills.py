"""Kills a scan of the embedded model again and again and resumes it.

    python -m tests.resume.kills FOLDER COUNT

A process of its own, since forking a process with threads is unsafe, and one that has everything imported and
the model loaded, so that a scan begins in no time. Nothing but loading is left out: each child runs the whole
scan. Prints one JSON object: `wanted`, the table of an undisturbed scan, and `kills`, for each the moment in
seconds, how many units it left, and the table after resuming.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch

import qprobe.scanning as road
from qprobe.models.reference import load_reference
from qprobe.options import ScanOptions
from qprobe.samples.sources import Samples
from qprobe.sampling import choose_samples

SEED = 0


def options(out: Path) -> ScanOptions:
    return ScanOptions("demo", samples=3, batch_size=1, nodes=1, max_new_tokens=4, device="cpu", out=out)


def silent(*asked: object) -> Samples:
    """The demo's scenes without their answers, so that answers are generated and can be interrupted."""
    found = choose_samples(*asked)  # type: ignore[arg-type]
    return Samples(tuple(replace(s, answer=None) for s in found.samples))


def child(work: Callable[[], object]) -> int:
    """The process id of a child that does `work` and ends with status 0, or 1 if it raises."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> tuple[int, float]:
    """(exit status of a child, negative if a signal killed it; the CPU seconds it took)."""
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def table_of(folder: Path) -> str:
    """The layer table after resuming the scan in `folder` up to its table, which is all that is compared."""

    def resume() -> None:
        road.choose_list = lambda *_: os._exit(0)
        road.scan(options(folder))

    status, _ = ended(child(resume))
    assert status == 0, status
    return (folder / "layers.csv").read_text()


def kill_at(pid: int, seconds: float) -> None:
    """SIGKILL the child once it has used that much CPU time, which a busy machine does not stretch."""
    process = psutil.Process(pid)
    while process.status() != psutil.STATUS_ZOMBIE and sum(process.cpu_times()[:2]) < seconds:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


def main(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    reference = load_reference("demo", "cpu")
    road.load_reference = lambda *_, **__: reference
    road.write_report = lambda *_: []
    road.choose_samples = silent  # type: ignore[assignment]
    road.scan(options(folder / "first"))  # so that children inherit all that is made on first use
    status, seconds = ended(child(lambda: road.scan(options(folder / "undisturbed"))))
    assert status == 0, status
    wanted = (folder / "undisturbed" / "layers.csv").read_text()
    moments = random.Random(SEED)
    kills = []
    for number in range(count):
        run = folder / str(number)
        # One moment in each slice of the scan, so that no part of it is left out by chance.
        moment = (number + moments.random()) * seconds / count
        pid = child(lambda run=run: road.scan(options(run)))
        kill_at(pid, moment)
        status, _ = ended(pid)
        units = len(list((run / "units").glob("*.parquet")))
        kills.append({"moment": moment, "status": status, "units": units, "table": table_of(run)})
    print(json.dumps({"wanted": wanted, "seconds": seconds, "kills": kills}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
