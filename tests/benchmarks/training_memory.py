"""A QLoRA step at full size: what `plan --training` says and what is measured, by part, on three bases.

    python -m tests.benchmarks.training_memory [--full-size] [--device cuda] [--out FILE]

Builds the exact geometry of Llama-3.2-11B-Vision with seeded random weights in memory; leaves it in 16-bit,
or turns every linear but the head (standard), or but the published list (dynamic), into 4-bit; puts adapters
of rank 16 on them and trains on one sequence of 2,048 tokens and 4 tiles. Prints the bytes of each part,
predicted and measured, and the seconds of a step, as Markdown. Without --full-size a tiny model of the same
architecture checks the script on a CPU, where activations are what operations make (`tests.training.peak`).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from qprobe.checkpoint.ready import lora_targets, ready_for_training
from qprobe.checkpoint.starts.attached import peft_library
from qprobe.checkpoint.storage import stored_bytes
from qprobe.loading.inventory import list_layers
from qprobe.models.families.mllama import UNSLOTH_LLAMA_11B
from qprobe.options import Optimizer
from qprobe.records import FormatSpec, Inventory
from qprobe.training.memory import (
    CODE_TABLE_BYTES,
    Step,
    activations_of,
    adapted_linears,
    adapter_sizes,
    optimizer_bytes,
)
from tests.benchmarks.cost import build, full_config, synchronize, tiny_config
from tests.benchmarks.hardware import made_with
from tests.training.peak import LiveBytes

GIB = 1 << 30
WARM_UP, REPEATS = 2, 5


@dataclass(frozen=True)
class Bytes:
    """Bytes of each part of a step. whole: at its peak."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    whole: int


@dataclass(frozen=True)
class Measured:
    """One layout: its layers in 4-bit, bytes as predicted and as measured, seconds of a whole step."""

    name: str
    layers_4bit: int
    predicted: Bytes
    measured: Bytes
    seconds: float


def into_4bit(model: Any, four_bit: frozenset[str], device: torch.device) -> None:
    """The linears `four_bit` of `model` as bitsandbytes' layers, one after another."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name in sorted(four_bit):
        parent, _, leaf = name.rpartition(".")
        old = model.get_submodule(name)
        new = Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=torch.bfloat16,
            quant_type="nf4", compress_statistics=True, device="meta",
        )  # fmt: skip
        weight = Params4bit(
            old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )  # quantized by the move, though it is there already
        new.weight = weight.to(device)
        if old.bias is not None:
            new.bias = torch.nn.Parameter(old.bias.data, requires_grad=False)
        new.support_avx512bf16_for_cpu = False
        setattr(model.get_submodule(parent), leaf, new)
    model.is_loaded_in_4bit = bool(four_bit)  # peft asks for it


def sequence(config: MllamaConfig, step: Step, device: torch.device) -> dict[str, torch.Tensor]:
    """One batch; labels on every token but the image's, which costs what any labels cost."""
    generator = torch.Generator().manual_seed(0)
    shape, size = (step.batch_size, step.tokens), config.vision_config.image_size
    ids = torch.randint(3, config.text_config.vocab_size - 8, shape, generator=generator)
    labels = ids.clone()
    ids[:, 1], labels[:, 1] = config.image_token_index, -100
    tiles = (step.batch_size, 1, step.tiles)
    inputs = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(*tiles, 3, size, size, generator=generator).to(torch.bfloat16),
        "aspect_ratio_ids": torch.full((step.batch_size, 1), 6),  # 2 x 2 tiles
        "aspect_ratio_mask": torch.ones(tiles, dtype=torch.long),
        "cross_attention_mask": torch.ones(step.batch_size, step.tokens, 1, step.tiles, dtype=torch.long),
    }
    return {key: value.to(device) for key, value in inputs.items()}


def make_optimizer(parameters: list[Any], name: Optimizer) -> Any:
    """AdamW, in 8 bit where asked."""
    if name == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=2e-4)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=2e-4)


def predict(model: Any, inventory: Inventory, kept: frozenset[str], step: Step) -> Bytes:
    """What `plan --training` counts for the layout that keeps `kept`; model: in 16-bit still."""
    in_4bit = sum(not x.fixed for x in inventory.layers if x.name not in kept)
    weights = inventory.total_bytes(kept) + CODE_TABLE_BYTES * in_4bit
    adapter = adapter_sizes(adapted_linears(inventory.layers, type(model).__name__, step.adapt), step.rank)
    states = optimizer_bytes(adapter, step.optimizer)
    activations = activations_of(model, inventory.layers, step).peak
    parameters = 4 * sum(adapter)
    whole = weights + 2 * parameters + states + activations
    return Bytes(weights, parameters, parameters, states, activations, whole)


def measure(
    name: str, config: MllamaConfig, kept: frozenset[str], step: Step, device: torch.device
) -> Measured:
    """Builds the layout that keeps `kept` in 16-bit, trains a few steps, gives its bytes and seconds."""
    model = build(config, device).model
    inventory = list_layers(model, FormatSpec())
    four_bit = frozenset(x.name for x in inventory.layers if not x.fixed) - kept
    predicted = predict(model, inventory, kept, step)
    into_4bit(model, four_bit, device)
    gc.collect()
    weights = stored_bytes(model).total_bytes + CODE_TABLE_BYTES * len(four_bit)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        weights = torch.cuda.memory_allocated(device)
    ready_for_training(model)
    peft = peft_library()
    lora = peft.LoraConfig(r=step.rank, lora_alpha=step.rank, target_modules=lora_targets(model, step.adapt))
    tuned = peft.get_peft_model(model, lora).train()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, step.optimizer)
    inputs = sequence(config, step, device)

    def one_step() -> None:
        # As the Trainer does: the loss alone is held while the backward pass runs.
        tuned(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    for _ in range(WARM_UP):
        one_step()
    adapters = sum(p.nbytes for p in trained)
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    states = state_bytes(optimizer)
    activations, whole = _peak(one_step, device, weights + adapters + gradients + states)
    measured = Bytes(weights, adapters, gradients, states, activations, whole)
    seconds = sorted(_seconds(one_step, device) for _ in range(REPEATS))[REPEATS // 2]
    return Measured(name, len(four_bit), predicted, measured, seconds)


def state_bytes(optimizer: Any) -> int:
    """Bytes of the optimizer's states, without the code tables that all tensors share and its step counts."""
    return sum(
        x.nbytes
        for state in optimizer.state.values()
        for key, x in state.items()
        if isinstance(x, torch.Tensor) and x.dim() and not key.startswith("qmap")
    )


def _peak(work: Any, device: torch.device, standing: int) -> tuple[int, int]:
    """(bytes that `work` makes at its peak, all bytes then); on a CPU the latter count what is `standing`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        peak = torch.cuda.max_memory_allocated(device)
        return peak - before, peak
    with LiveBytes() as live:
        work()
    return live.peak, standing + live.peak


def _seconds(work: Any, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def published_kept(inventory: Inventory, full: bool) -> frozenset[str]:
    """The layers that Unsloth's list keeps; on the tiny model, the cross-attention's output projections."""
    if full:
        return UNSLOTH_LLAMA_11B.kept(inventory)
    return frozenset(x.name for x in inventory.layers if x.name.endswith("cross_attn.o_proj"))


def report(found: Sequence[Measured], title: str, unit: str) -> str:
    """Two Markdown tables: bytes by part, each predicted / measured / ratio, and seconds a step."""
    size = {"GiB": GIB, "MiB": 1 << 20}[unit]
    lines = [
        "# Memory and time of a QLoRA step\n",
        f"{title}\n",
        f"Predicted / measured, {unit} (ratio). Measured activations are all that a step makes on top of "
        "what stands before it. The whole is the peak of the step; on a GPU with the batch and "
        "the workspaces of its libraries.\n",
        f"| base | 4-bit layers | {' | '.join(x.name for x in fields(Bytes))} | seconds a step |",
        "|---" * (len(fields(Bytes)) + 3) + "|",
    ]
    for x in found:
        pairs = [(getattr(x.predicted, y.name), getattr(x.measured, y.name)) for y in fields(Bytes)]
        cells = [f"{p / size:.3f} / {m / size:.3f} ({p / m:.3f})" for p, m in pairs]
        lines.append(f"| {x.name} | {x.layers_4bit} | {' | '.join(cells)} | {x.seconds:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the three layouts and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--tokens", type=int, default=None, help="[default: 2048, or 256 at the tiny size]")
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--out", type=Path, help="Markdown file to write as well.")
    options = parser.parse_args()
    device = torch.device(options.device)
    config = full_config() if options.full_size else tiny_config()
    optimizer: Optimizer = "adamw_8bit" if device.type == "cuda" else "adamw_torch"
    step = Step(1, options.tokens or (2048 if options.full_size else 256), options.tiles, 16, optimizer)
    with torch.device("meta"):
        inventory = list_layers(MllamaForConditionalGeneration(config), FormatSpec())
    every = frozenset(x.name for x in inventory.layers)
    found = []
    for name, kept in (
        ("16-bit", every),
        ("nf4", frozenset()),
        ("dynamic", published_kept(inventory, options.full_size)),
    ):
        found.append(measure(name, config, kept, step, device))
        print(found[-1], file=sys.stderr, flush=True)  # so that a later failure loses nothing
        gc.collect()
    title = (
        f"{'Geometry of Llama-3.2-11B-Vision' if options.full_size else 'A tiny Mllama'}, random weights, "
        f"{step.tokens} tokens, {step.tiles} tiles, rank {step.rank}, {step.optimizer}; median of {REPEATS} "
        f"steps. {made_with(options.device)}. Command: `python -m tests.benchmarks.training_memory"
        f"{' --full-size' if options.full_size else ''} --device {device.type}`."
    )
    text = report(found, title, "GiB" if options.full_size else "MiB")
    print(text)
    if options.out is not None:
        options.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
