"""The parts of the full-size benchmark, each in a process of its own, and what runs in these processes."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.alone import run_alone

CALIBRATED = ("--format", "nf4-calibrated", "--tune", "0")


@dataclass(frozen=True)
class Ran:
    """A finished process: its JSON object (None if it failed), seconds, and the most memory it held."""

    found: dict[str, Any] | None
    seconds: float
    host_bytes: int
    why: str = ""


def run(arguments: Sequence[str], limit_s: float) -> Ran:
    """`python ARGUMENTS`, killed with all that it started after `limit_s` seconds.

    Its stdout must be one JSON object.
    """
    done = run_alone([sys.executable, *arguments], limit_s)
    if done.status == 0:
        return Ran(_parsed(done.out), done.seconds, done.peak_bytes)
    why = f"killed after {limit_s:.0f} s" if done.status is None else done.err.strip()[-1500:]
    return Ran(None, done.seconds, done.peak_bytes, why or f"ended with status {done.status}")


def _parsed(text: str) -> dict[str, Any]:
    """The object on stdout; empty where several processes wrote there."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


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

    def scan(self, images: int, name: str, *more: str, processes: int = 1) -> Ran:
        """`qprobe scan` into a fresh folder, by so many processes."""
        out = self.run_folder(name)
        shutil.rmtree(out, ignore_errors=True)
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        program = "tests.benchmarks.generated" if self.options.generated else "qprobe"
        asked = [*(torchrun if processes > 1 else ()), "-m", program, "scan", "--json"]
        asked += ["--model", str(self.folder), "--out", str(out)]
        if "weight" not in more:
            asked += ["--data", str(self.samples), "--samples", str(images)]
            asked += ["--batch-size", str(self.options.batch_size), "--device", self.options.device]
        return run([*asked, *more], self.options.limit)

    def run_folder(self, name: str) -> Path:
        return self.options.folder / f"run-{name}-{self.share}"

    def select(self) -> Ran:
        asked = ["-m", "qprobe", "select", str(self.run_folder("scan")), "--budget", "+20%", "--json"]
        return run(asked, self.options.limit)

    def quantize(self) -> Ran:
        """The dynamic model as a checkpoint, which plain transformers loads in `loadplain`."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        asked = ["-m", "qprobe", "quantize", str(self.run_folder("scan") / "skiplist.json"), "--json"]
        asked += ["--model", str(self.folder), "--out", str(self.checkpoint)]
        return run([*asked, "--device", self.options.device], self.options.limit)

    @property
    def checkpoint(self) -> Path:
        return self.options.folder / f"dynamic-{self.share}"

    def load4(self) -> Ran:
        return run(self._child("load4"), self.options.limit)

    def load_plain(self) -> Ran:
        return run(self._child("loadplain"), self.options.limit)

    def weight(self) -> Ran:
        return self.scan(0, "weight", "--measures", "weight", "--device", "cpu")

    def streamed(self) -> Ran:
        """The default scan within a memory limit."""
        return self.scan(self.most_images, "streamed", "--max-memory", self.options.max_memory)

    def calibrated(self) -> Ran:
        """The scan with calibrated weights, without tuning."""
        spread = ("--device", "auto") if self.options.generated and self.options.device == "cuda" else ()
        return self.scan(self.most_images, "calibrated", *CALIBRATED, *spread)

    def spread(self) -> Ran:
        """The default scan with the model over all GPUs."""
        return self.scan(self.most_images, "spread", "--device", "auto")

    def shards(self, name: str, *more: str) -> Ran:
        """A scan by `--processes` of torchrun, a GPU each, or several where there are twice as many or more.

        What the one that chose left behind.
        """
        ran = self.scan(self.most_images, name, *more, *self.wide, processes=self.options.processes)
        if ran.found is None:
            return ran
        left = json.loads((self.run_folder(name) / "notes" / "end.json").read_text())
        return replace(ran, found={"seconds": left["seconds"], "peak_bytes": left["peak_bytes"]})

    @property
    def wide(self) -> tuple[str, ...]:
        """What lets each of the processes spread the model over its GPUs, where it has several."""
        import torch

        has_several = torch.cuda.device_count() >= 2 * self.options.processes
        return ("--device", "auto") if has_several else ()

    def copy(self) -> Ran:
        return run(self._child("copy"), self.options.limit)

    def speeds(self) -> Ran:
        return run(self._child("speeds"), self.options.limit)

    def _child(self, part: str) -> list[str]:
        o = self.options
        own = ["-m", "tests.benchmarks.full_size", "--child", part, "--folder", str(o.folder)]
        own += ["--device", o.device, "--share", str(self.share), "--bare-seconds", str(o.bare_seconds)]
        own += ["--batch-size", str(o.batch_size), "--shard-gb", str(o.shard_gb)]
        own += ["--geometry", o.geometry, *(["--generated"] if o.generated else [])]
        return [*own, "--tiny"] if o.tiny else own


# What runs in a process of its own ----------------------------------------------------------------------


def child_write(bench: Bench) -> dict[str, Any]:
    from tests.benchmarks.checkpoints import geometry, processor, write_checkpoint, write_samples

    o = bench.options
    config = geometry(bench.share, o.tiny, o.geometry)
    write_samples(bench.samples.parent, config, bench.most_images)
    parts = [processor(config)]
    if o.generated:
        from tests.benchmarks.generated import write_outline

        return {"bytes": write_outline(bench.folder, config, parts)}
    return {"bytes": write_checkpoint(bench.folder, config, parts, o.device, int(o.shard_gb * 1e9))}


def child_bare(bench: Bench) -> dict[str, Any]:
    """Loading, and the 16-bit model alone on the scan's batches, for as long as a scan takes."""
    import torch

    from qprobe.data.sampling import Wanted, from_data, split_held_out
    from qprobe.loading.inventory import list_layers
    from qprobe.loading.reference import load_reference
    from qprobe.measure.memory import peak_bytes
    from qprobe.measure.outputs import run_model
    from qprobe.measure.subject import Subject, processed_samples
    from qprobe.records import FormatSpec

    o = bench.options
    start = time.perf_counter()
    reference = load_reference(str(bench.folder), o.device)
    load = time.perf_counter() - start
    unpacked: Any = None
    inventory = list_layers(reference.model, FormatSpec())
    dtype = reference.model.dtype
    processed = processed_samples(reference.processor, reference.model.config, dtype)
    subject = Subject(reference, inventory, {}, unpacked, dtype, processed)
    start = time.perf_counter()
    parts = split_held_out(from_data(Wanted(data=bench.samples), bench.most_images).samples)
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

    from qprobe.checkpoint.load import load_dynamic_4bit
    from qprobe.measure.memory import peak_bytes

    device = torch.device(bench.options.device)
    start = time.perf_counter()
    manifest = bench.run_folder("scan") / "skiplist.json"
    model, _ = load_dynamic_4bit(manifest, str(bench.folder), bench.options.device)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak_bytes(device), "final_bytes": _held(model, device)}


def _held(model: Any, device: Any) -> int:
    """Bytes that a loaded model leaves allocated, or on the CPU those of its tensors and their state."""
    import torch

    from qprobe.checkpoint.storage import stored_bytes

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else stored_bytes(model).total_bytes


def child_loadplain(bench: Bench) -> dict[str, Any]:
    """The checkpoint of `qprobe quantize`, loaded by transformers alone."""
    import torch
    from transformers import AutoModelForImageTextToText

    from qprobe.measure.memory import peak_bytes

    device = torch.device(bench.options.device)
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(bench.checkpoint, device_map={"": device})
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak_bytes(device), "final_bytes": _held(model, device)}


def child_speeds(bench: Bench) -> dict[str, Any]:
    """Bytes per second read from files, and weights per second of the quantizer, each alone on the CPU."""
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


def child_copy(bench: Bench) -> dict[str, Any]:
    """Bytes a second of copies to the device alone."""
    import torch

    from tests.benchmarks.full_size_streamed import copy_speed

    return {"speed": copy_speed(torch.device(bench.options.device))}


CHILDREN = {
    "write": child_write,
    "bare": child_bare,
    "load4": child_load4,
    "loadplain": child_loadplain,
    "speeds": child_speeds,
    "copy": child_copy,
}
