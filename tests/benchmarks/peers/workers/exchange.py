"""What a peer's process is given, and what it hands back. Needs torch and transformers, nothing of qprobe."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    """model: a checkpoint folder; inputs: for each calibration sample; out: where results go."""

    model: Path
    inputs: list[dict[str, Tensor]]
    out: Path
    device: str
    options: dict[str, Any]

    def load(self) -> Any:
        """The model in float32, so that a peer is not judged by the rounding of its activations."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        auto = AutoModelForImageTextToText if has_images(self.model) else AutoModelForCausalLM
        return auto.from_pretrained(self.model, dtype=torch.float32).to(self.device).eval()

    @property
    def rows(self) -> list[list[int]]:
        """The token ids of each sample, for tools that take text alone."""
        assert not has_images(self.model), "is not run with images here"
        return [x["input_ids"][0].tolist() for x in self.inputs]

    def batches(self) -> list[dict[str, Tensor]]:
        """Keyword arguments of the model for each sample, on the device."""
        return [{name: x.to(self.device) for name, x in one.items()} for one in self.inputs]

    def cropped(self) -> Tensor:
        """All passages in one tensor, cut to the shortest, for tools that ask for one length."""
        shortest = min(len(row) for row in self.rows)
        return torch.tensor([row[:shortest] for row in self.rows])


@dataclass
class Cost:
    """seconds and peak_bytes of quantizing: of the device where there is one, else of the whole process."""

    seconds: float = 0.0
    peak_bytes: int = 0


def has_images(model: Path) -> bool:
    """Whether the checkpoint has a vision tower."""
    return "vision_config" in json.loads((model / "config.json").read_text())


def read_job() -> Job:
    """The job that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    task = json.loads(given.task.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    inputs = torch.load(task["inputs"], weights_only=True)
    return Job(Path(task["model"]), inputs, given.out, given.device, given.options)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear but the output head, which all of these tools leave in 16-bit."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] != "lm_head"
    }


@contextmanager
def measured(device: str) -> Iterator[Cost]:
    """The cost of what runs while open; it is complete when this closes."""
    cost = Cost()
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield cost
    if is_cuda:
        torch.cuda.synchronize()
    cost.seconds = time.perf_counter() - start
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cost.peak_bytes = torch.cuda.max_memory_allocated() if is_cuda else 1024 * kilobytes


def group_bits(columns: int, bits: float, group: int, of_group: int) -> float:
    """Bits per weight of rows of `columns`, with `of_group` bits of scale and zero point for each group."""
    return bits + ceil(columns / group) * of_group / columns


def hand_back(
    job: Job,
    name: str,
    weights: Mapping[str, Tensor],
    bits: Mapping[str, float],
    cost: Cost,
    tool: str,
    note: str = "",
) -> None:
    """Write what a format reads back, with the bits per weight that it stores, for measuring."""
    folder = job.out / name
    folder.mkdir()
    kept = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in weights.items()}
    save_file(kept, folder / "weights.safetensors")
    made = {"bits": dict(bits), "note": note, **_made_with(cost, tool)}
    (folder / "made.json").write_text(json.dumps(made))


def hand_back_lists(job: Job, name: str, lists: Mapping[str, list[str]], cost: Cost, tool: str) -> None:
    """Write one chooser's skip-lists by share of the saved bytes: linears that stay in 16-bit."""
    (job.out / f"{name}.lists.json").write_text(json.dumps({"lists": dict(lists), **_made_with(cost, tool)}))


def _made_with(cost: Cost, tool: str) -> dict[str, Any]:
    versions = {x: version(x) for x in ("torch", "transformers", tool)}
    return {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "versions": versions}


def input_energy(model: nn.Module, run: Callable[[], None]) -> dict[str, Tensor]:
    """The mean square of each input channel of each linear while `run` runs the model."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, torch.zeros((), device=x.device)) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in linears(model).items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / counts[name]).float() for name, total in sums.items()}
