"""A QLoRA step at full size: what `plan --training` says and what is measured, standard and dynamic 4-bit.

    python -m tests.benchmarks.training_memory [--full-size] [--device cuda]

Builds the exact geometry of Llama-3.2-11B-Vision with seeded random weights in memory, turns every linear
but the head (standard), or but the published list (dynamic), into 4-bit, puts adapters of rank 16 on them
and trains on one sequence of 2,048 tokens and 4 tiles. Prints bytes predicted and measured, and seconds
a step of both side by side. Without --full-size a tiny model of the same architecture checks the script on
a CPU.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MllamaConfig

from qprobe.build.ready import lora_targets, ready_for_training
from qprobe.build.storage import stored_bytes
from qprobe.models.catalogue import UNSLOTH_LLAMA_11B
from qprobe.models.inventory import list_layers
from qprobe.options import Optimizer
from qprobe.records import FormatSpec, Inventory
from qprobe.training.bases import peft_library
from qprobe.training.memory import (
    CODE_TABLE_BYTES,
    Step,
    activations_of,
    adapted_layers,
    adapter_sizes,
    optimizer_bytes,
)
from tests.benchmarks.cost import build, full_config, synchronize, tiny_config
from tests.training.peak import LiveBytes

GIB = 1 << 30
WARM_UP, REPEATS = 2, 5


@dataclass(frozen=True)
class Measured:
    """One layout: bytes predicted and measured, by part, and seconds of a whole step."""

    predicted_weights: int
    predicted_step: int
    weights: int
    step: int
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
        # On a device already: it is the move to one that quantizes.
        weight = Params4bit(
            old.weight.data.cpu() if device.type == "cuda" else old.weight.data,
            requires_grad=False, quant_type="nf4", compress_statistics=True,
        )  # fmt: skip
        new.weight = weight.to(device)
        if old.bias is not None:
            new.bias = torch.nn.Parameter(old.bias.data, requires_grad=False)
        new.support_avx512bf16_for_cpu = False
        setattr(model.get_submodule(parent), leaf, new)
    model.is_loaded_in_4bit = True


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


def measure(config: MllamaConfig, kept: frozenset[str], step: Step, device: torch.device) -> Measured:
    """Builds the layout that keeps `kept` in 16-bit, trains a few steps, and gives its bytes and seconds."""
    model = build(config, device).model
    inventory = list_layers(model, FormatSpec())
    four_bit = frozenset(x.name for x in inventory.layers if not x.fixed) - kept
    adapter = adapter_sizes(adapted_layers(inventory.layers, step.vision), step.rank)
    activations = activations_of(model, inventory.layers, step).peak
    predicted_weights = inventory.total_bytes(kept) + CODE_TABLE_BYTES * len(four_bit)
    states = optimizer_bytes(adapter, step.optimizer)
    predicted_step = predicted_weights + 8 * sum(adapter) + states + activations

    into_4bit(model, four_bit, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        weights = torch.cuda.memory_allocated(device)
    else:
        weights = stored_bytes(model).total_bytes + CODE_TABLE_BYTES * len(four_bit)
    ready_for_training(model)
    peft = peft_library()
    lora = peft.LoraConfig(r=step.rank, lora_alpha=step.rank, target_modules=lora_targets(model, step.vision))
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
    peak = _peak(one_step, device, weights + 8 * sum(p.numel() for p in trained) + states)
    seconds = sorted(_seconds(one_step, device) for _ in range(REPEATS))[REPEATS // 2]
    return Measured(predicted_weights, predicted_step, weights, peak, seconds)


def _peak(work: Any, device: torch.device, standing: int) -> int:
    """Bytes at the peak of `work`; on a CPU, what it makes on top of what is `standing`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with LiveBytes() as live:
        work()
    return standing + live.peak


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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--tokens", type=int, default=None, help="[default: 2048, or 256 at the tiny size]")
    parser.add_argument("--tiles", type=int, default=4)
    options = parser.parse_args()
    device = torch.device(options.device)
    config = full_config() if options.full_size else tiny_config()
    optimizer: Optimizer = "adamw_8bit" if device.type == "cuda" else "adamw_torch"
    step = Step(1, options.tokens or (2048 if options.full_size else 256), options.tiles, 16, optimizer)
    with torch.device("meta"):
        from transformers import MllamaForConditionalGeneration

        inventory = list_layers(MllamaForConditionalGeneration(config), FormatSpec())
    unit, name = (GIB, "GiB") if options.full_size else (1 << 20, "MiB")
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{title}, torch {torch.__version__}; {step}")
    print(f"{'layout':10} {'weights':>22} {'step':>22} {'ratio':>7} {'s/step':>8}")
    print(f"{'':10} {f'predicted, {name}':>22} {'predicted, measured':>22}")
    for layout, kept in (
        ("standard", frozenset()),
        ("dynamic", published_kept(inventory, options.full_size)),
    ):
        found = measure(config, kept, step, device)
        gc.collect()
        weights = f"{found.predicted_weights / unit:.3f} {found.weights / unit:10.3f}"
        whole = f"{found.predicted_step / unit:.3f} {found.step / unit:10.3f}"
        ratio = found.predicted_step / found.step
        print(f"{layout:10} {weights:>22} {whole:>22} {ratio:7.3f} {found.seconds:8.3f}", flush=True)


if __name__ == "__main__":
    main()
