"""Oracles of a training: its first loss from logits, and its adapter as the file holds it."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from qprobe.inputs.decoder import answer_of, layout_of
from qprobe.inputs.processed import ProcessedSamples
from tests.benchmarks.architecture_matrix.oracles import unlike
from tests.benchmarks.architecture_matrix.outputs import answer_logits, output_of, sample_of, unpadded
from tests.benchmarks.architecture_matrix.road import HELD_OUT, Course

LOSS_TOLERANCE = 1e-2  # relative, of bf16 logits


def untrue_training(course: Course, processor: Any) -> dict[str, list[str]]:
    """By oracle, what disagrees in a training that came to its end."""
    done, tuned = course.given["finetune"]
    losses = held_out_losses(course, processor)
    return {
        "loss": unlike(
            "loss ahead of the first step", done.eval_loss_before, sum(losses) / len(losses), LOSS_TOLERANCE
        ),
        "adapter": adapter(load_file(done.out / "adapter_model.safetensors"), tuned),
    }


def held_out_losses(course: Course, processor: Any) -> list[float]:
    """Of each held-out line the mean cross entropy of its answer's tokens in the model as loaded."""
    model = course.given["load"]
    layout = layout_of(model)
    processed = ProcessedSamples(processor, torch.bfloat16, layout)
    count = len(course.data.read_text().splitlines())
    found = []
    for line in range(count - HELD_OUT, count):
        sample = sample_of(course, f"line-{line + 1}")
        batch = unpadded(processed.batch([sample]))
        start, end = batch.answers[0]
        if layout.decoder is None:
            ids = batch.inputs["input_ids"][0, start:end]
        else:  # which learns what comes ahead of an answer too, as transformers' own scripts have it
            start = start if layout.decoder.prompt == "decoder" else 1
            ids = torch.tensor(answer_of(processor, layout.decoder, sample).ids[start - 1 :])
        logits = answer_logits(output_of(model, batch).logits, batch, start)
        found.append(float(cross_entropy(logits.float(), ids)))
    return found


def adapter(stored: dict[str, Any], tuned: Any) -> list[str]:
    """What is not as `stored` in the reloaded model, and that no step moved any of it."""
    held = {name.replace(".default", ""): x for name, x in tuned.named_parameters() if "lora_" in name}
    wrong = [f"{name} is in one of file and model" for name in sorted(set(held) ^ set(stored))]
    wrong += [
        f"{name} is not as stored"
        for name in sorted(set(held) & set(stored))
        if not torch.equal(held[name].detach(), stored[name].to(held[name].dtype))
    ]
    moved = [name for name, x in stored.items() if "lora_B" in name and bool(x.any())]
    return wrong if moved else [*wrong, "no lora_B has moved from 0"]
