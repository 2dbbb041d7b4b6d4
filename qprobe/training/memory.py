"""What a QLoRA step occupies, from the config alone: weights, adapters, gradients, optimizer, activations.

The peak of a step with recomputed blocks lies in one of two moments: at the loss, where the logits stand in
float32, or in the backward pass of the largest block, whose activations are computed again. The counts are
those of transformers' models with peft's LoRA in float32; tests hold them against measured bytes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qprobe.checkpoint.plan import SizePlan, planned_skeleton, sizes_of
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest
from qprobe.models.adapting import adapted
from qprobe.models.family import CROSS, PROJECTOR, VISION
from qprobe.options import DEFAULT_ADAPT, Optimizer
from qprobe.records import FormatSpec, Linear

GIB = 1 << 30
CARDS_GB = (16, 24, 32, 40, 48, 80)
# Of a card's nominal GiB the driver leaves about 97.5 % (an 80 GB H100 has 79.1 with ECC on), and the CUDA
# context with the libraries' workspaces takes about half a GiB that no tensor may have.
USABLE, CONTEXT_BYTES = 0.975, GIB // 2
CODE_TABLE_BYTES = 16 * 4 + 256 * 4 + 4  # of each 4-bit layer; other sizes of qprobe leave them out
LOGIT_BYTES = 12  # of a token and word at once: log-softmax, its gradient and the logits' gradient, float32
SMALLEST_8BIT = 4096  # bitsandbytes keeps the states of smaller tensors in float32
TILE_PIXELS = 560  # side of a tile where the config names no image size, as Qwen2-VL's
NOT_TRAINED = ("nf4-single", "fp4")


@dataclass(frozen=True)
class Step:
    """What is trained: `tokens` in a sequence (image tokens included), `tiles` images tiles beside it.

    adapt: where adapters go, see `qprobe.models.adapting`. processes: that train together, a card each; the
    batch is that of one card.
    """

    batch_size: int = 1
    tokens: int = 2048
    tiles: int = 4
    rank: int = 16
    optimizer: Optimizer = "adamw_8bit"
    adapt: str = DEFAULT_ADAPT
    processes: int = 1


@dataclass(frozen=True)
class Activations:
    """Bytes at the two moments that can be the peak.

    kept: what stands from the forward pass at both: inputs of blocks, and what is not recomputed.
    at_loss, in_block: what comes on top at the loss, and in the backward pass of the largest block.
    """

    kept: int
    at_loss: int
    in_block: int

    @property
    def peak(self) -> int:
        return self.kept + max(self.at_loss, self.in_block)


@dataclass(frozen=True)
class Card:
    """A card of `gb` GiB by name. margin_bytes: what is left of the usable ones; negative if too little."""

    gb: int
    usable_bytes: int
    margin_bytes: int
    fits: bool


@dataclass(frozen=True)
class LayoutMemory:
    """Bytes of one layout on one card; weights with quantization state and code tables.

    exchange_bytes: what processes exchange gradients through, which torch keeps beside them.
    """

    name: str
    weight_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    exchange_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    total_bytes: int
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class TrainingPlan:
    """What `plan --training` adds to `sizes`."""

    sizes: SizePlan
    step: Step
    adapted_layers: int
    adapter_parameters: int
    activations: Activations
    layouts: tuple[LayoutMemory, ...]

    def to_json(self) -> dict[str, Any]:
        """The object `training` of `plan --json`."""
        return {
            **asdict(self.step),
            "adapted_layers": self.adapted_layers,
            "adapter_parameters": self.adapter_parameters,
            "activations": {**asdict(self.activations), "peak": self.activations.peak},
            "layouts": [asdict(x) for x in self.layouts],
        }


def training_plan(
    model: str,
    step: Step,
    manifest: Manifest | str | Path | None = None,
    trust_remote_code: bool = False,
) -> TrainingPlan:
    """Memory of a step on `model` in 16-bit, standard 4-bit, by published lists and `manifest`.

    trust_remote_code: as of `plan`, and its errors.
    """
    written = manifest if isinstance(manifest, Manifest) or manifest is None else read_manifest(manifest)
    skeleton = planned_skeleton(model, written, trust_remote_code)
    sizes = sizes_of(skeleton, written)
    layers = skeleton.inventory(written.format if written else FormatSpec()).layers
    adapted = adapted_linears(layers, skeleton.architecture, step.adapt)
    adapter = adapter_sizes(adapted, step.rank)
    activations = activations_of(skeleton.model, layers, step)
    layouts = [
        _layout(x.name, x.total_bytes + CODE_TABLE_BYTES * x.layers_4bit, adapter, activations, step)
        for x in sizes.layouts
        if x.name not in NOT_TRAINED
    ]
    return TrainingPlan(sizes, step, len(adapted), sum(adapter), activations, tuple(layouts))


def adapted_linears(layers: Sequence[Linear], architecture: str, adapt: str) -> tuple[Linear, ...]:
    """The linears that adapters go on, as `lora_targets` chooses them."""
    linears = [x for x in layers if x.experts is None]
    fixed = frozenset(x.name for x in linears if x.fixed in ("lm_head", "tied"))
    names = set(adapted([x.name for x in linears], fixed, architecture, adapt).names)
    return tuple(x for x in linears if x.name in names)


def adapter_sizes(layers: Iterable[Linear], rank: int) -> list[int]:
    """Parameters of each adapter matrix: A (rank, in_features) and B (out_features, rank) of every layer."""
    return [rank * width for x in layers for width in (x.in_features, x.out_features)]


def optimizer_bytes(sizes: Iterable[int], optimizer: Optimizer) -> int:
    """Bytes of AdamW's two states of every tensor: float32, or 8 bit and a scale for each block of 256."""
    total = 0
    for n in sizes:
        in_8bit = optimizer == "adamw_8bit" and n >= SMALLEST_8BIT
        total += 2 * (n + 4 * math.ceil(n / 256)) if in_8bit else 8 * n
    return total


def _layout(
    name: str, weight_bytes: int, adapter: Sequence[int], activations: Activations, step: Step
) -> LayoutMemory:
    parameters = 4 * sum(adapter)  # float32, as peft makes them on a 16-bit or 4-bit base
    states = optimizer_bytes(adapter, step.optimizer)
    # DistributedDataParallel's buckets are copies of all gradients: accelerate makes no views of them.
    exchange = parameters if step.processes > 1 else 0
    total = weight_bytes + 2 * parameters + exchange + states + activations.peak
    cards = []
    for gb in CARDS_GB:
        usable = int(USABLE * gb * GIB) - CONTEXT_BYTES
        cards.append(Card(gb, usable, usable - total, total <= usable))
    return LayoutMemory(
        name, weight_bytes, parameters, parameters, exchange, states, activations.peak, total, tuple(cards)
    )


# Activations ----------------------------------------------------------------------------------------------


def activations_of(model: Any, layers: Sequence[Linear], step: Step) -> Activations:
    """Bytes of activations at the peak of a step; model: in 16-bit, on the meta device."""
    config: Any = model.config
    text = step.batch_size * step.tokens
    seen = step.batch_size * vision_tokens(config, step.tiles)
    on = {x.name: x.tower for x in adapted_linears(layers, type(model).__name__, step.adapt)}
    sees = VISION in on.values()
    blocks: defaultdict[str, list[Linear]] = defaultdict(list)
    kept = 0
    for x in layers:
        block = _block(x.name)
        if block is not None:
            blocks[block].append(x)
        elif x.tower == PROJECTOR and step.tiles and (x.name in on or sees):
            # Its input for the adapter, in float32, and its output, which cross-attention or text reads.
            kept += seen * (4 * x.in_features * (x.name in on) + 2 * x.out_features)
    largest = 0
    for name, members in blocks.items():
        is_vision = members[0].tower == VISION
        if is_vision and not (sees and seen):
            continue  # nothing in it needs a gradient, so nothing of it is kept
        width = seen if is_vision else text
        saved, moving = _block_bytes(members, width, seen, on)
        if _recomputed(model, name):
            kept += 2 * members[0].in_features * width
            largest = max(largest, saved + moving)
        else:
            kept += saved
            largest = max(largest, moving)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    words: int = 0 if head is None else head.weight.shape[0]
    return Activations(kept, LOGIT_BYTES * text * words, largest)


def _block(name: str) -> str | None:
    """The block that a linear is in: its name up to its first number; None outside the blocks."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else None


def _recomputed(model: nn.Module, block: str) -> bool:
    """True if transformers recomputes this block in the backward pass; Mllama's vision blocks it does not."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(model.get_submodule(block), GradientCheckpointingLayer)


def _block_bytes(layers: Sequence[Linear], tokens: int, seen: int, on: Container[str]) -> tuple[int, int]:
    """(saved, moving): bytes that a block's forward pass saves, and that its backward pass adds at most.

    Saved for each token: of every linear its input in float32 (for the adapter's A, where it is one of `on`)
    and its output in 16-bit (for what follows it); the activation function's output; the inputs of two norms
    in float32; attention's
    output. Moving: gradients at the widest linear, of adapter (float32) and base, and one weight unpacked.
    Cross-attention reads its keys and values from `seen` vision tokens.
    """
    hidden, widest = layers[0].in_features, max(x.in_features for x in layers)
    saved = tokens * (2 * widest + 8 * hidden + 2 * hidden)
    for x in layers:
        reads = seen if x.tower == CROSS and x.reads == "vision" else tokens
        saved += reads * (4 * x.in_features * (x.name in on) + 2 * x.out_features)
    moving = tokens * (5 * widest + 8 * hidden) + 2 * max(x.in_features * x.out_features for x in layers)
    return saved, moving


def vision_tokens(config: Any, tiles: int) -> int:
    """Tokens that the vision tower makes of `tiles` tiles, its class token counted; 0 without a tower."""
    vision = getattr(config, "vision_config", None)
    patch = getattr(vision, "patch_size", None)
    if vision is None or not isinstance(patch, int):
        return 0
    side = getattr(vision, "image_size", None)
    side = side if isinstance(side, int) else TILE_PIXELS
    return tiles * ((side // patch) ** 2 + 1)
