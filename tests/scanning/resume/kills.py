"""Kills each kind of work again and again, does it again, and says what came of it.

    python -m tests.scanning.resume.kills FOLDER JOB=COUNT...

A process of its own, since forking a process with threads is unsafe, and one that has everything imported,
so that work begins in no time. Nothing else is left out but pictures: each child does the whole work. Prints
one JSON object, for each job: `wanted`, the files of an undisturbed run with their digests; `seconds`, the
CPU time of one; and `kills`, for each its moment in CPU seconds, how the child ended, how many files it left,
and the files after doing the same again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

import qprobe.scanning.scan as road
from qprobe.checkpoint.quantize import quantize
from qprobe.data.builtin import Samples
from qprobe.data.sampling import choose_samples
from qprobe.scanning import finish, samples
from qprobe.scanning.join import join
from tests import tiny
from tests.emulation import compute_bf16_by_float32

SEED = 0
MODEL = "llama"
# What differs between two undisturbed runs of one command: by the name of the file, its keys.
TIMES = {"end.json": ("seconds", "peak_bytes")}


def options(folder: Path, out: Path) -> dict[str, Any]:
    model = folder / MODEL
    few = {"samples": 5, "batch_size": 1, "max_new_tokens": 4}
    return {"model": str(model), "device": "cpu", "out": out, **few}


def scanned(folder: Path, out: Path) -> None:
    road.scan(**options(folder, out))


def demo_scanned(_: Path, out: Path) -> None:
    road.scan("demo", samples=3, batch_size=1, max_new_tokens=4, device="cpu", out=out)


def calibrated(folder: Path, out: Path) -> None:
    road.scan(**options(folder, out), format="nf4-calibrated")


def limited(folder: Path, out: Path) -> None:
    # On a CPU every weight of a block waits in a file, whatever the limit.
    road.scan(**options(folder, out), max_memory="64GiB")


def weighed(folder: Path, out: Path) -> None:
    road.scan(str(folder / "sharded"), device="cpu", out=out, measures=("weight",))


def joined(folder: Path, out: Path) -> None:
    join([folder / "share-0", folder / "share-1"], out)


def quantized(folder: Path, out: Path) -> None:
    if not out.exists():  # else it is complete, which is compared
        quantize(folder / "whole" / "skiplist.json", out, str(folder / MODEL), "cpu")


def shares(folder: Path) -> None:
    """What is joined: the two shares of one scan."""
    for rank in ("0", "1"):
        os.environ |= {"RANK": rank, "WORLD_SIZE": "2"}
        scanned(folder, folder / f"share-{rank}")
    del os.environ["RANK"], os.environ["WORLD_SIZE"]


def sharded(folder: Path) -> None:
    """A checkpoint of many files, each of which is a unit."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / MODEL)
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")


def nothing(folder: Path) -> None:
    """What needs no more than the model."""


JOBS: Mapping[str, tuple[Callable[[Path], None], Callable[[Path, Path], None]]] = {
    "demo": (nothing, demo_scanned),
    "scan": (nothing, scanned),
    "calibrated": (nothing, calibrated),
    "limited": (nothing, limited),
    "weights": (sharded, weighed),
    "join": (shares, joined),
    "quantize": (lambda folder: scanned(folder, folder / "whole"), quantized),
}
"""What each needs, which is made once, and the work: from the folder with what it needs, into another one."""


QUIET = {"quantize": 0.1}
"""The share of a job that reads only, and is not worth many kills; 0 where it is not named."""


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


def kill_at(pid: int, seconds: float) -> None:
    """SIGKILL the child once it has used that much CPU time, which a busy machine does not stretch."""
    process = psutil.Process(pid)
    while process.status() != psutil.STATUS_ZOMBIE and sum(process.cpu_times()[:2]) < seconds:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


def files(folder: Path) -> dict[str, str]:
    """Digests of all files in `folder` but empty ones, which are locks, by path; without times."""
    found = {}
    for path in sorted(x for x in folder.rglob("*") if x.is_file()):
        data = path.read_bytes()
        if path.name in TIMES:
            values = json.loads(data)
            for key in TIMES[path.name]:
                values.pop(key, None)
            data = json.dumps(values).encode()
        if data and not path.name.startswith(".lock"):
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def killed(folder: Path, job: str, count: int) -> dict[str, Any]:
    """The findings of one job."""
    prepare, work = JOBS[job]
    prepare(folder)
    own = folder / job
    work(folder, own / "first" / "out")  # so that children inherit all that is made on first use

    def seconds_into(place: Path) -> float:
        status, seconds = ended(child(lambda: work(folder, place / "out")))
        assert status == 0, (job, status)
        return seconds

    seconds = seconds_into(own / "undisturbed")
    moments = random.Random(SEED)
    kills: list[dict[str, Any]] = []
    for number in range(count):
        place = own / str(number)
        # One moment in each slice of the work, so that no part of it is left out by chance.
        quiet = QUIET.get(job, 0.0)
        moment = (quiet + (1 - quiet) * (number + moments.random()) / count) * seconds
        pid = child(lambda place=place: work(folder, place / "out"))
        kill_at(pid, moment)
        status, _ = ended(pid)
        left = len(files(place))
        seconds_into(place)
        kills.append({"moment": moment, "status": status, "left": left, "files": files(place)})
    return {"wanted": files(own / "undisturbed"), "seconds": seconds, "kills": kills}


def without_answers(*asked: Any) -> Samples:
    """The demo's scenes without their answers, so that answers are generated and can be interrupted."""
    return Samples(tuple(replace(s, answer=None) for s in choose_samples(*asked).samples))


def main(folder: Path, *asked: str) -> None:
    torch.set_num_threads(1)
    compute_bf16_by_float32()
    samples.choose_samples = without_answers
    finish.write_report = lambda *_: []
    tiny.write(MODEL, folder / MODEL)
    jobs = dict(one.split("=") for one in asked)
    print(json.dumps({job: killed(folder, job, int(count)) for job, count in jobs.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
