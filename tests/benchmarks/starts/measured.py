"""Every start on one base: where it begins, and what training makes of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qprobe.checkpoint.adapters.corrected import Factors, start_corrected
from qprobe.formats.nf4 import StoredNf4
from qprobe.inputs.encoding import IGNORED
from qprobe.training.distilled import answer_logits, by_line, distil, lessons_of
from tests.benchmarks.hardware import made_with
from tests.benchmarks.starts.bases import (
    RANK,
    Asked,
    Inputs,
    Task,
    base_weights,
    corrections,
    load,
    open_task,
    prepared,
)
from tests.emulation import compute_bf16_by_float32

STARTS = ("zero", "loftq", "corrected", "distilled")
RATE, WARMUP = 2e-4, 0.05
LOOKS = (0, 20)  # and the last step


@dataclass(frozen=True)
class Found:
    """One base of one model. kl: by start, of each held-out sample, summed over its `tokens`.

    losses: by start and seed, for each look (step, mean loss of each judged line, nats per answer token).
    """

    model: str
    base: str
    tokens: list[int]
    kl: dict[str, list[float]]
    losses: dict[str, list[list[tuple[int, list[float]]]]]
    distilled: tuple[int, float, float]
    seconds: float
    made_with: str


def begin(tuned: Any, start: str, seed: int, factors: Factors, weights_file: Path) -> None:
    """Puts the adapter of `tuned` where `start` says; `distilled` begins as `corrected`."""
    torch.manual_seed(seed)
    for module in tuned.modules():
        if hasattr(module, "reset_lora_parameters"):
            module.reset_lora_parameters("default", True)
    if start == "loftq":
        loftq(tuned, weights_file)
    elif start != "zero":
        start_corrected(tuned, factors)


def loftq(tuned: Any, weights_file: Path) -> None:
    """peft's own on CUDA, which it asks for; elsewhere the same decomposition of the same residual."""
    from peft import replace_lora_weights_loftq
    from peft.tuners.lora import Linear4bit
    from peft.utils.loftq_utils import _low_rank_decomposition
    from safetensors import safe_open

    if next(tuned.parameters()).device.type == "cuda":
        replace_lora_weights_loftq(tuned, str(weights_file))
        return
    with safe_open(weights_file, "pt") as file:
        for name, module in tuned.get_base_model().named_modules():
            if isinstance(module, Linear4bit):
                weight: Any = module.get_base_layer().weight
                kept = StoredNf4(weight.data, weight.quant_state).packed().unpack().float()
                residual = file.get_tensor(f"{name}.weight").float() - kept
                parts = _low_rank_decomposition(residual, reduced_rank=RANK)
                module.lora_A["default"].weight.data = parts["R"].contiguous()
                module.lora_B["default"].weight.data = parts["L"].contiguous()


# One base -------------------------------------------------------------------------------------------------


def measure(asked: Asked) -> Found:
    """Every start on one base: its KL, and what training makes of it."""
    begun = time.perf_counter()
    torch.set_num_threads(1)
    if asked.device == "cpu":
        compute_bf16_by_float32()  # the last bit apart, it is the processor's own bf16
    task = open_task(asked)
    given = prepared(task)
    weights = base_weights(task, asked.base, given)
    factors = corrections(task, weights, given)
    weights_file = asked.work / f"{asked.model}-{asked.base}" / "model.safetensors"
    weights_file.parent.mkdir(parents=True, exist_ok=True)
    own = {f"{n}.weight": task.subject.modules[n].weight.data for n in task.subject.quantized}
    save_file({n: x.cpu().contiguous().clone() for n, x in own.items()}, weights_file)
    held_out = lessons_of(task.subject.model, task.inputs(task.held_out, 8))
    lessons = lessons_of(task.subject.model, task.inputs(task.calibration, 8))
    judged = task.inputs(task.judged, 8)
    tuned = load(task, asked, weights)
    del given, weights
    gc.collect()
    found: dict[str, list[float]] = {}
    losses: dict[str, list[list[tuple[int, list[float]]]]] = {}
    taught = (0, float("nan"), float("nan"))
    adapter: list[Tensor] | None = None
    trained = [x for x in tuned.parameters() if x.requires_grad]
    for start in STARTS:
        losses[start] = []
        for seed in asked.seeds:
            begin(tuned, start, seed, factors, weights_file)
            if start == "distilled" and adapter is None:
                done = distil(tuned, lessons, asked.distill, at_once=2)
                taught, adapter = (done.steps, done.before, done.after), [x.detach().clone() for x in trained]
            if start == "distilled" and adapter is not None:
                for parameter, value in zip(trained, adapter, strict=True):
                    parameter.data.copy_(value)
            if start not in found:
                found[start] = by_line(tuned, held_out)
            losses[start].append(list(train(tuned, task, judged, seed, asked.steps)))
            print(
                f"{asked.model} {asked.base} {start} seed {seed}: {time.perf_counter() - begun:.0f} s",
                flush=True,
            )
    tokens = [len(x) for lesson in held_out for x in lesson.logits]
    seconds = time.perf_counter() - begun
    return Found(asked.model, asked.base, tokens, found, losses, taught, seconds, made_with(asked.device))


def train(
    tuned: Any, task: Task, judged: list[Inputs], seed: int, steps: int
) -> Iterator[tuple[int, list[float]]]:
    """Trains as `finetune` does, and looks at the judged lines: (step, mean loss of each)."""
    trained = [x for x in tuned.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    warm = max(1, round(WARMUP * steps))
    generator = torch.Generator().manual_seed(seed)
    batches: list[Inputs] = []
    for step in range(steps + 1):
        if step in (*LOOKS, steps):
            yield step, [x for inputs in judged for x in line_losses(tuned, inputs)]
        if step == steps:
            return
        if not batches:
            order = torch.randperm(len(task.training), generator=generator).tolist()
            batches = task.inputs([task.training[i] for i in order])
        rate = RATE * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        tuned(**batches.pop(0)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


def line_losses(tuned: Any, inputs: Inputs) -> list[float]:
    """The mean loss of each line, nats per answer token."""
    with torch.no_grad():
        answers = answer_logits(tuned, inputs)
    labels = inputs["labels"][:, 1:]
    return [
        float(torch.nn.functional.cross_entropy(rows.float(), mine[mine != IGNORED].to(rows.device)))
        for rows, mine in zip(answers, labels, strict=True)
    ]
