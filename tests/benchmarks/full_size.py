"""The real command line at full size: what each stage costs in seconds, memory, and bare forward passes.

    python -m tests.benchmarks.full_size [--parts ...] [--images 4 8 16 32 64] [--layers 0.25 0.5 1]

Writes a checkpoint of the exact geometry of Llama-3.2-11B-Vision with seeded random weights (21.3 GB), 32
images of 4 tiles with prompts of 256 tokens and answers of 64, and runs `python -m qprobe` on them, each
command in a process of its own. The bare forward of the same samples runs warm and for `--bare-seconds`, so
that both see the same clocks. Prints Markdown, a row as soon as it is known, so that a killed run leaves a
table. Parts: write, bare, activation (weight + activation error only), scan, select, load4, and, on request,
weight (the weight-only scan on the CPU beside the bare read of the files and the quantizer's own speed).
With --images or --layers it prints how scan time grows instead. `--tiny` checks all of it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("write", "bare", "activation", "scan", "select", "load4")
GIB = 2**30


@dataclass(frozen=True)
class Ran:
    """A finished process: its JSON object (None if it failed), seconds, and the most memory it held."""

    found: dict[str, Any] | None
    seconds: float
    host_bytes: int
    why: str = ""


def run(arguments: Sequence[str], limit_s: float) -> Ran:
    """`python ARGUMENTS`, killed after `limit_s` seconds; its stdout must be one JSON object."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err)
        timer = threading.Timer(limit_s, os.kill, (process.pid, signal.SIGKILL))
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        text, said = out.read().decode(), err.read().decode(errors="replace")
    host = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if process.returncode == 0:
        return Ran(json.loads(text), seconds, host)
    why = f"killed after {limit_s:.0f} s" if process.returncode == -signal.SIGKILL else said.strip()[-1500:]
    return Ran(None, seconds, host, why)


@dataclass(frozen=True)
class Bench:
    """What is run on. share: of the layers."""

    options: argparse.Namespace
    share: float = 1.0

    @property
    def folder(self) -> Path:
        return self.options.folder / f"model-{self.share}"

    @property
    def samples(self) -> Path:
        return self.options.folder / "samples" / "samples.jsonl"

    def write(self) -> Ran:
        return run([*self._child("write"), "--images", str(self.most_images)], self.options.limit)

    @property
    def most_images(self) -> int:
        return max(self.options.images or [32])

    def bare(self, images: int) -> Ran:
        return run([*self._child("bare"), "--images", str(images)], self.options.limit)

    def scan(self, images: int, name: str, *more: str) -> Ran:
        """`qprobe scan` into a fresh folder."""
        out = self.run_folder(name)
        shutil.rmtree(out, ignore_errors=True)
        asked = ["-m", "qprobe", "scan", "--json", "--model", str(self.folder), "--out", str(out)]
        if "weight" not in more:
            asked += ["--data", str(self.samples), "--samples", str(images)]
            asked += ["--batch-size", str(self.options.batch_size), "--device", self.options.device]
        return run([*asked, *more], self.options.limit)

    def run_folder(self, name: str) -> Path:
        return self.options.folder / f"run-{name}-{self.share}"

    def select(self) -> Ran:
        asked = ["-m", "qprobe", "select", str(self.run_folder("scan")), "--budget", "+20%", "--json"]
        return run(asked, self.options.limit)

    def load4(self) -> Ran:
        return run(self._child("load4"), self.options.limit)

    def weight(self) -> Ran:
        return self.scan(0, "weight", "--measures", "weight", "--device", "cpu")

    def speeds(self) -> Ran:
        return run(self._child("speeds"), self.options.limit)

    def _child(self, part: str) -> list[str]:
        o = self.options
        own = ["-m", "tests.benchmarks.full_size", "--child", part, "--folder", str(o.folder)]
        own += ["--device", o.device, "--share", str(self.share), "--bare-seconds", str(o.bare_seconds)]
        own += ["--batch-size", str(o.batch_size), "--shard-gb", str(o.shard_gb)]
        return [*own, "--tiny"] if o.tiny else own


# What runs in a process of its own ----------------------------------------------------------------------


def child_write(bench: Bench) -> dict[str, Any]:
    from tests.benchmarks.checkpoints import geometry, write_checkpoint, write_samples

    o = bench.options
    config = geometry(bench.share, o.tiny)
    write_samples(bench.samples.parent, config, bench.most_images)
    return {"bytes": write_checkpoint(bench.folder, config, o.device, int(o.shard_gb * 1e9))}


def child_bare(bench: Bench) -> dict[str, Any]:
    """Loading, and the 16-bit model alone on the scan's batches, for as long as a scan takes."""
    import torch

    from qprobe.measure.memory import peak_bytes
    from qprobe.measure.outputs import run_model
    from qprobe.measure.subject import Subject
    from qprobe.models.inventory import list_layers
    from qprobe.models.reference import load_reference
    from qprobe.records import FormatSpec
    from qprobe.samples.sources import from_jsonl
    from qprobe.sampling import split_held_out

    o = bench.options
    start = time.perf_counter()
    reference = load_reference(str(bench.folder), o.device)
    load = time.perf_counter() - start
    subject = Subject(reference, list_layers(reference.model, FormatSpec()), {}, None)  # type: ignore[arg-type]
    start = time.perf_counter()
    parts = split_held_out(from_jsonl(bench.samples, None, bench.most_images).samples)
    batches = [
        [subject.encode(g) for g in subject.groups(p, o.batch_size)] if p else []  # none held out of two
        for p in parts
    ]
    encode = time.perf_counter() - start

    def synchronize() -> None:
        if reference.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_of(part: int) -> float:
        synchronize()
        begun = time.perf_counter()
        for batch in batches[part]:
            run_model(reference.model, batch)
        synchronize()
        return time.perf_counter() - begun

    rounds: list[tuple[float, float]] = []
    with torch.inference_mode():
        seconds_of(0)  # warm
        begun = time.perf_counter()
        while not rounds or time.perf_counter() - begun < o.bare_seconds:
            rounds.append((seconds_of(0), seconds_of(1)))
    middle = [sorted(x)[len(rounds) // 2] for x in zip(*rounds, strict=True)]
    sizes = [sum(b.size for b in part) for part in batches]
    batch = batches[0][0]
    return {
        "load": load, "encode": encode, "calibration": middle[0], "held_out": middle[1],
        "rounds": len(rounds), "samples": sizes, "text_tokens": batch.inputs["input_ids"].shape[1],
        "answer_tokens": batch.answer_tokens // batch.size, "peak_bytes": peak_bytes(reference.device),
    }  # fmt: skip


def child_load4(bench: Bench) -> dict[str, Any]:
    """The 4-bit model that the scan's skip-list describes, checked on loading."""
    import torch

    from qprobe.build.load import load_dynamic_4bit
    from qprobe.measure.memory import peak_bytes

    start = time.perf_counter()
    load_dynamic_4bit(bench.run_folder("scan") / "skiplist.json", str(bench.folder), bench.options.device)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak_bytes(torch.device(bench.options.device))}


def child_speeds(bench: Bench) -> dict[str, Any]:
    """Bytes a second of reading the files alone, and weights a second of the quantizer alone, on the CPU."""
    import torch

    from qprobe.formats.nf4 import Nf4

    start, total, buffer = time.perf_counter(), 0, bytearray(16 * 2**20)
    for path in sorted(bench.folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    read = total / (time.perf_counter() - start)
    weight = torch.empty(256, 4096, dtype=torch.bfloat16).normal_(std=0.02)
    Nf4().pack(weight)
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < 5:
        Nf4().pack(weight)
        times += 1
    return {"read": read, "quantizer": times * weight.numel() / (time.perf_counter() - start), "bytes": total}


CHILDREN = {"write": child_write, "bare": child_bare, "load4": child_load4, "speeds": child_speeds}


# Tables -------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)


def row(name: str, seconds: float, ratio: float | None, device: float | None, host: float | None) -> None:
    """One line of the table; device and host in bytes."""
    cells = [name, f"{seconds:.2f}", "" if ratio is None else f"{ratio:.2f}"]
    say(f"| {' | '.join([*cells, *('' if b is None else f'{b / GIB:.1f}' for b in (device, host))])} |")


def head(title: str, columns: str) -> None:
    say(f"\n{title}\n\n| {columns} |\n|{'---|' * (columns.count('|') + 1)}")


def machine(options: argparse.Namespace) -> str:
    import torch

    from qprobe.measure.identity import library_versions

    card = (
        torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    )
    libraries = ", ".join(f"{name} {v}" for name, v in library_versions().items())
    return f"{card}, {os.cpu_count()} CPU cores, {libraries}."


def stages(bench: Bench) -> None:
    """The table of seconds and peak memory of each part."""
    head(
        f"{machine(bench.options)} Batch size {bench.options.batch_size}.",
        "stage | seconds | bare forwards of the same samples | device peak GiB | host peak GiB",
    )
    parts, bare = bench.options.parts, None
    if "write" in parts:
        ran = bench.write()
        named(ran, f"write the checkpoint ({(ran.found or {}).get('bytes', 0):,} bytes)")
    if "bare" in parts:
        ran = bench.bare(bench.most_images)
        bare = ran.found
        named(ran, "bare forward: the whole process")
        if bare:
            host, all_of_it = ran.host_bytes, bare["calibration"] + bare["held_out"]
            row("load the 16-bit model", bare["load"], None, bare["peak_bytes"], host)
            row("decode and process the images twice", bare["encode"], None, None, None)
            texts = f"{bare['text_tokens']} text tokens, {bare['answer_tokens']} of the answer"
            samples = bare["samples"]
            row(
                f"bare forward, all {sum(samples)} samples ({texts})",
                all_of_it,
                1.0,
                bare["peak_bytes"],
                host,
            )
            row(f"bare forward, {samples[0]} calibration samples", bare["calibration"], 1.0, None, None)
            row(f"bare forward, {samples[1]} held-out samples", bare["held_out"], 1.0, None, None)
    if "activation" in parts:
        scanned(
            bench.scan(bench.most_images, "activation", "--measures", "activation"),
            "weight + activation",
            bare,
        )
    if "scan" in parts:
        scanned(bench.scan(bench.most_images, "scan"), "default scan", bare)
    if "select" in parts:
        named(bench.select(), "select again, another budget: the whole process")
    if "load4" in parts:
        ran = bench.load4()
        if ran.found:
            row(
                "load the dynamic 4-bit model",
                ran.found["seconds"],
                None,
                ran.found["peak_bytes"],
                ran.host_bytes,
            )
        else:
            named(ran, "load the dynamic 4-bit model")
    if "weight" in parts:
        weights(bench)


def named(ran: Ran, name: str) -> None:
    """The row of a whole process, and what went wrong where something did."""
    failed = "" if ran.found is not None else " (failed)"
    row(f"{name}{failed}", ran.seconds, None, (ran.found or {}).get("peak_bytes"), ran.host_bytes)
    if ran.why:
        say(f"\n```\n{ran.why}\n```\n")


def scanned(ran: Ran, name: str, bare: dict[str, Any] | None) -> None:
    """Rows of the stages of one `qprobe scan`. measure is held against the calibration samples, choose
    against the held-out ones, and everything after loading against all of them."""
    named(ran, f"{name}: the whole process")
    if ran.found is None:
        return
    parts = {"measure": "calibration", "choose": "held_out"}
    found = ran.found["seconds"]
    for stage, seconds in found.items():
        against = bare[parts[stage]] if bare and stage in parts else None
        ratio = seconds / against if against else None
        row(f"{name}: {stage}", seconds, ratio, None, None)
    after = sum(found.values()) - found["load"]
    once = bare["calibration"] + bare["held_out"] if bare else None
    ratio = after / once if once else None
    row(f"{name}: everything after loading", after, ratio, ran.found["peak_bytes"], ran.host_bytes)


def weights(bench: Bench) -> None:
    """The weight-only scan beside the floor that reading and quantizing set."""
    speeds = bench.speeds()
    ran = bench.weight()
    named(ran, "weight-only scan on the CPU: the whole process")
    if not (speeds.found and ran.found):
        say(f"\n{speeds.why or ran.why}\n")
        return
    seconds, found = ran.found["seconds"]["weights"], speeds.found
    rate, reading = found["bytes"] / 2 / seconds, found["bytes"] / found["read"]
    say(
        f"\nWeight-only: {found['bytes'] / 1e9:.2f} GB in {seconds:.1f} s, {rate / 1e6:.1f} M weights/s; the "
        f"quantizer alone {found['quantizer'] / 1e6:.1f} M weights/s; the bare read of the files "
        f"{found['read'] / 1e9:.2f} GB/s ({reading:.1f} s)."
    )


def growth(options: argparse.Namespace) -> None:
    """Tables of scan time by images and by layers."""
    columns = "bare forward s | weights s | measure s | choose s | all after loading s"
    if options.images:
        bench = Bench(options)
        named_failure(bench.write())
        head(machine(options), f"images | {columns} | all but weights, s an image")
        for count in options.images:
            line = grown(bench, count)
            say(f"| {count} | {line[0]} | {line[1] / count:.3f} |" if line else f"| {count} | failed |")
        shutil.rmtree(bench.folder)
    if options.layers:
        head(
            machine(options), f"share of the layers | {columns} | all after loading, s a whole model's layers"
        )
        for share in options.layers:
            bench = Bench(options, share)
            named_failure(bench.write())
            line = grown(bench, 32)
            say(f"| {share} | {line[0]} | {line[2] / share:.2f} |" if line else f"| {share} | failed |")
            shutil.rmtree(bench.folder)


def named_failure(ran: Ran) -> None:
    if ran.why:
        say(f"\n```\n{ran.why}\n```\n")


def grown(bench: Bench, images: int) -> tuple[str, float, float] | None:
    """(cells, seconds but for the weights, seconds after loading) of one scan; None if it failed."""
    bare, ran = bench.bare(images), bench.scan(images, f"grown-{images}")
    named_failure(bare)
    named_failure(ran)
    if bare.found is None or ran.found is None:
        return None
    found = ran.found["seconds"]
    after = sum(found.values()) - found["load"]
    once = bare.found["calibration"] + bare.found["held_out"]
    cells = [once, found["weights"], found["measure"], found["choose"], after]
    return " | ".join(f"{x:.2f}" for x in cells), after - found["weights"], after


def parsed() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the same architecture at a size for a CPU")
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument("--images", type=int, nargs="+", help="scan time by number of images")
    parser.add_argument("--layers", type=float, nargs="+", help="scan time by share of the layers")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--bare-seconds", type=float, default=15.0, help="how long the bare forward runs")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which a part is killed")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="size of a checkpoint file")
    parser.add_argument("--folder", type=Path, help="where to work; kept if passed")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=1.0, help="of the layers, for the parts")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - {*PARTS, "weight"}:
        parser.error(f"no part is called {sorted(unknown)[0]}; there are {', '.join(PARTS)}, weight")
    return options


def main() -> None:
    options = parsed()
    if options.child:
        print(json.dumps(CHILDREN[options.child](Bench(options, options.share))))
        return
    say(f"    python -m tests.benchmarks.full_size {' '.join(sys.argv[1:])}")
    with tempfile.TemporaryDirectory(prefix="qprobe-full-size-") as temporary:
        options.folder = options.folder or Path(temporary)
        if options.images or options.layers:
            growth(options)
        else:
            stages(Bench(options, options.share))


if __name__ == "__main__":
    main()
