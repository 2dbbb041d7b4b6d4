"""Kills each command again and again, fills the disk under it, does it again, and says what came of it.

    python -m tests.benchmarks.kills [--points 60] [--disk 20] [--json] [JOB=COUNT...]

A process of its own, since forking a process with threads is unsafe, and one that has everything imported, so
that work begins in no time; nothing else is left out but drawing: reports hold other bytes in the place of
pictures. All work is on images, and is
done by children: one undisturbed, and for each point one that is killed (or that may write no file longer
than so many bytes, as where a disk is full) and one that does the same again. Points are drawn from all of a
child's CPU time, one in each slice of it. Prints a table, or with --json one JSON object, for each job:
`wanted`, the files of the undisturbed child with their digests; `seconds`, its CPU time; and `kills` and
`disks`, for each the point, how the child ended, what it said, how many files it left, and the files after
doing the same again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import qprobe
from qprobe.calibration import two_sided
from qprobe.errors import QprobeError
from qprobe.manifest.write import write_manifest
from qprobe.report import write
from qprobe.runs.folder import RunFolder
from qprobe.scanning import finish
from qprobe.selection.replaced import select_into
from tests import tiny
from tests.checkpoint.manifests import every_third, manifest_for
from tests.emulation import compute_bf16_by_float32

SEED = 0
MODEL = "llava_pixtral"
# What differs between two undisturbed runs of one command: by the name of the file, its keys.
TIMES = {"end.json": ("seconds", "peak_bytes"), "finetune.json": ("result",), "compare.json": ()}
UNLIKE = (".png", ".svg", ".html", "README.md")  # hold times; of these, that they are there counts
REFUSED = 3  # the exit status of a child whose error is explained in a sentence

Work = Callable[[Path, Path], object]
"""Work on the folder with what it needs, into another one."""


def options(folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    few = {"samples": 5, "batch_size": 2, "max_new_tokens": 3, "data": folder / "scan.jsonl"}
    return {"model": str(folder / MODEL), "device": "cpu", "out": out, **few, **more}


def scanned(folder: Path, out: Path) -> None:
    qprobe.scan(**options(folder, out))


def calibrated(folder: Path, out: Path) -> None:
    qprobe.scan(**options(folder, out, format="nf4-calibrated", measures=("activation",)))


def limited(folder: Path, out: Path) -> None:
    # On a CPU every weight of a block waits in a file, whatever the limit.
    qprobe.scan(**options(folder, out, max_memory="64GiB"))


def weighed(folder: Path, out: Path) -> None:
    qprobe.scan(str(folder / "sharded"), device="cpu", out=out, measures=("weight",))


def selected(_: Path, out: Path) -> None:
    select_into(out / "skiplist.json", RunFolder(out), "+40%", by="weight_nmse")


def reported(_: Path, out: Path) -> None:
    qprobe.write_report(out)


def compared(folder: Path, out: Path) -> None:
    few = {"samples": 2, "max_new_tokens": 2, "data": folder / "scan.jsonl", "device": "cpu"}
    qprobe.compare(out / "skiplist.json", model=str(folder / MODEL), **few)


def joined(folder: Path, out: Path) -> None:
    qprobe.join([folder / "share-0", folder / "share-1"], out)


def quantized(folder: Path, out: Path) -> None:
    if not out.exists():  # else it is complete, which is compared
        qprobe.quantize(folder / "kept.json", out, str(folder / MODEL), "cpu")


def finetuned(folder: Path, out: Path) -> None:
    record = out / "finetune.json"
    if record.exists() and json.loads(record.read_text())["status"] == "finished":
        return
    qprobe.finetune(
        folder / "kept.json", data=folder / "train.jsonl", out=out, model=str(folder / MODEL), device="cpu",
        steps=3, accumulation=1, rank=2, save_every=1, max_length=256,
    )  # fmt: skip


def merged(folder: Path, out: Path) -> None:
    if not out.exists():
        few = {"samples": 2, "max_new_tokens": 2, "data": folder / "scan.jsonl", "device": "cpu"}
        qprobe.merge(folder / "adapter", out=out, model=str(folder / MODEL), as_="16-bit", **few)


def nothing(_: Path) -> None:
    """What needs no more than the model and the data."""


def whole(folder: Path) -> None:
    """A finished scan."""
    if not (folder / "whole").exists():
        scanned(folder, folder / "whole")


def shares(folder: Path) -> None:
    """What is joined: the two shares of one scan."""
    for rank in ("0", "1"):
        os.environ |= {"RANK": rank, "WORLD_SIZE": "2"}
        scanned(folder, folder / f"share-{rank}")
    del os.environ["RANK"], os.environ["WORLD_SIZE"]


def sharded(folder: Path) -> None:
    """A checkpoint of many files, each of which is a unit."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder / MODEL)
    model.save_pretrained(folder / "sharded", max_shard_size="40KB")


def adapter(folder: Path) -> None:
    """What is merged."""
    finetuned(folder, folder / "adapter")


@dataclass(frozen=True)
class Job:
    """needs: is made once. is_in_run: works in a finished run, which is copied before."""

    work: Work
    needs: Callable[[Path], None] = nothing
    is_in_run: bool = False


JOBS: Mapping[str, Job] = {
    "scan": Job(scanned),
    "calibrated": Job(calibrated),
    "limited": Job(limited),
    "weights": Job(weighed, sharded),
    "select": Job(selected, whole, is_in_run=True),
    "report": Job(reported, whole, is_in_run=True),
    "compare": Job(compared, whole, is_in_run=True),
    "join": Job(joined, shares),
    "quantize": Job(quantized),
    "finetune": Job(finetuned),
    "merge": Job(merged, adapter),
}
WEIGHTS = {
    "scan": 3,
    "calibrated": 3,
    "finetune": 2,
    "quantize": 1.5,
    "merge": 1.5,
}  # of 60 points, 1 if not named


def child(work: Callable[[], object], most_bytes: int | None = None) -> tuple[int, int]:
    """(process id of a child that does `work`, what it says): it ends with status 0, `REFUSED`, or 1.

    most_bytes: no file may become longer.
    """
    sys.stdout.flush()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if most_bytes is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            work()
            status = 0
        except QprobeError as error:
            os.write(writing, str(error).encode()[:4000])
            status = REFUSED
        except BaseException as error:
            os.write(writing, repr(error).encode()[:4000])
        finally:
            os._exit(status)
    os.close(writing)
    return pid, reading


def ended(pid: int, reading: int) -> tuple[int, float, str]:
    """(exit status of a child, negative if a signal killed it; the CPU seconds it took; what it said)."""
    _, status, usage = os.wait4(pid, 0)
    with os.fdopen(reading, "rb") as file:
        said = file.read().decode("utf-8", "replace")
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, said


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
            is_unlike = path.name.endswith(UNLIKE)
            found[str(path.relative_to(folder))] = "" if is_unlike else hashlib.sha256(data).hexdigest()
    return found


@dataclass(frozen=True)
class Bench:
    """The job `name` in `folder`, where all that it needs lies."""

    folder: Path
    name: str

    def begun(self, place: Path) -> Callable[[], object]:
        """The work into `place`, which is made."""
        job = JOBS[self.name]
        place.mkdir(parents=True)
        if job.is_in_run:
            shutil.copytree(self.folder / "whole", place / "out")
        return lambda: job.work(self.folder, place / "out")

    def finished(self, work: Callable[[], object]) -> float:
        """The CPU seconds of a child that does the work."""
        status, seconds, said = ended(*child(work))
        assert status == 0, (self.name, status, said)
        return seconds

    def found(self, kills: int, disks: int) -> dict[str, Any]:
        """What undisturbed, killed and refused children leave."""
        JOBS[self.name].needs(self.folder)
        own = self.folder / self.name
        seconds = self.finished(self.begun(own / "undisturbed"))
        wanted, moments = files(own / "undisturbed"), random.Random(f"{SEED} {self.name}")
        sizes = sorted({x.stat().st_size for x in (own / "undisturbed").rglob("*") if x.is_file()})
        tried: dict[str, list[dict[str, Any]]] = {"kills": [], "disks": []}
        for number in range(kills):
            point = (number + moments.random()) / kills * seconds
            tried["kills"].append(self._tried(own / f"kill-{number}", point, None))
        for number in range(disks):
            # Some file does not fit: one byte less than a size that is written.
            size = sizes[int((number + moments.random()) / disks * len(sizes))]
            tried["disks"].append(self._tried(own / f"disk-{number}", None, max(0, size - 1)))
        return {"wanted": wanted, "seconds": seconds, **tried}

    def _tried(self, place: Path, moment: float | None, most_bytes: int | None) -> dict[str, Any]:
        work = self.begun(place)
        before = len(files(place))
        pid, reading = child(work, most_bytes)
        if moment is not None:
            kill_at(pid, moment)
        status, _, said = ended(pid, reading)
        left = len([x for x in place.rglob("*") if x.is_file()])
        self.finished(work)
        point = moment if most_bytes is None else most_bytes
        return {
            "point": point, "status": status, "said": said, "before": before, "left": left,
            "files": files(place),
        }  # fmt: skip


def quicken() -> None:
    """Lets this process compute as quickly as it can, with everything imported."""
    torch.set_num_threads(1)
    compute_bf16_by_float32()
    finish.write_report = lambda *_: []
    write._pictures = lambda *_: {name: bytes(60_000) for name in ("spikes.png", "spikes.svg")}
    two_sided.GROUPS = 1  # all rows of a weight move at once, in a sixteenth of the steps
    for name in ("bitsandbytes", "peft", "transformers.trainer"):
        __import__(name)


def prepare(folder: Path) -> None:
    """Writes model, data and a manifest into `folder`."""
    model = tiny.write(MODEL, folder / MODEL)
    rows = []
    for number in range(6):
        (folder / f"{number}.png").write_bytes(tiny.picture(number))
        rows.append({"image": f"{number}.png", "prompt": f"what is {number}?"})
    (folder / "scan.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "train.jsonl").write_text("\n".join(json.dumps({**x, "answer": "a bag"}) for x in rows))
    write_manifest(folder / "kept.json", manifest_for(model, every_third(model)))


def differing(found: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    """The files that are not as in the undisturbed run, after the same was done again."""
    wanted, got = found["wanted"], point["files"]
    return sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))


def shown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A table: for each job the points, how the children ended, and what was lost."""
    lines = [
        "| work | CPU s | killed | full disks refused | other errors | files lost, changed or left |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        points = [*one["kills"], *one["disks"]]
        killed = sum(x["status"] == -signal.SIGKILL for x in one["kills"])
        refused = sum(x["status"] == REFUSED for x in one["disks"])
        others = [x["said"] for x in points if x["status"] not in (0, REFUSED, -signal.SIGKILL)]
        lost = sorted({name for x in points for name in differing(one, x)})
        cells = [
            f"{name} | {one['seconds']:.2f}",
            f"{killed} of {len(one['kills'])} | {refused} of {len(one['disks'])}",
            "; ".join(others) or "none",
            ", ".join(lost) or "none",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(points: int) -> dict[str, int]:
    """So many points over all jobs."""
    total = sum(WEIGHTS.get(name, 1) for name in JOBS)
    shares = {name: int(points * WEIGHTS.get(name, 1) / total) for name in JOBS}
    for name in list(JOBS)[: points - sum(shares.values())]:
        shares[name] += 1
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--disk", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("jobs", nargs="*", metavar="JOB=COUNT", help="instead of points over all jobs")
    asked = parser.parse_args()
    kills = {name: int(n) for name, n in (x.split("=") for x in asked.jobs)} or spread(asked.points)
    disks = {} if asked.jobs else spread(asked.disk)
    quicken()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        found = {name: Bench(folder, name).found(n, disks.get(name, 0)) for name, n in kills.items()}
    print(json.dumps(found) if asked.json else shown(found))


if __name__ == "__main__":
    main()
