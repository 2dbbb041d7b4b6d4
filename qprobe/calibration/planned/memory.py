"""Device memory of a scan, from the skeleton and the shape of a batch: no weight is read, nothing runs.

Weights are counted to the byte: in 16-bit, in 4-bit beside them, and widened where the path is walked in
float32. A batch is an estimate of what the backward pass of the sensitivities holds, the largest moment of a
default scan: what blocks keep (see `qprobe.measure.hooks.checkpointed_blocks`), one block that runs again,
and the logits. Held against measured peaks in reports/full-size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from qprobe.calibration.gram import gram_bytes
from qprobe.calibration.room import rounding_bytes
from qprobe.formats.protocol import format_from
from qprobe.loading.skeleton import Skeleton
from qprobe.measure.attribution import path_dtype
from qprobe.measure.hooks import ROOM_BYTES, repeated_blocks
from qprobe.models.family import VISION
from qprobe.records import FormatSpec, Linear

KEPT_OF_A_ROW = 2  # of a block that runs again: its input, and the output of its attention
LOGIT_BYTES = 24  # of a word of an answer token: both models' logits, log-softmax and gradients, in float32


@dataclass(frozen=True)
class BatchShape:
    """A batch as a model reads it; the last three are of one sample, the text with its answer.

    vision_rows: of the vision tower, patches of all tiles.
    """

    samples: int
    tokens: int
    answer_tokens: int
    vision_rows: int = 0

    def rows_read(self, layer: Linear) -> int:
        """How many rows of a sample `layer` reads, of fused experts each of its tokens once."""
        is_vision = layer.tower == VISION or layer.reads == "vision"
        return self.vision_rows if is_vision else self.tokens


@dataclass(frozen=True)
class DeviceNeed:
    """Bytes on the device of a scan whose weights all stay there.

    weights: in 16-bit and 4-bit, and in float32 where the path is walked in it. batch: beside them.
    """

    weights: int
    batch: int

    @property
    def total(self) -> int:
        return self.weights + self.batch


def device_need(skeleton: Skeleton, fmt: FormatSpec, shape: BatchShape) -> DeviceNeed:
    """What a scan of this model in batches of `shape` holds at its peak."""
    model, layers = skeleton.model, skeleton.inventory(fmt).layers
    batch = batch_bytes(model, layers, shape)
    if fmt.is_calibrated:
        batch = max(batch, calibration_bytes(layers))
    return DeviceNeed(weight_bytes(model, layers, fmt), batch)


def weight_bytes(model: nn.Module, layers: Iterable[Linear], fmt: FormatSpec) -> int:
    """Bytes of all forms of the weights that a scan holds."""
    held = {id(x): x for x in (*model.parameters(), *model.buffers())}.values()  # tied weights once
    stored = sum(x.numel() * x.itemsize for x in held)
    wide = path_dtype(model).itemsize
    widened = sum(x.numel() * wide for x in held if x.is_floating_point() and x.itemsize < wide)
    four_bit = format_from(fmt)
    return stored + widened + sum(four_bit.held_bytes(x.stored_shape) for x in layers)


def batch_bytes(model: nn.Module, layers: Iterable[Linear], shape: BatchShape) -> int:
    """Estimated bytes of a batch at the peak of the passes of a scan, beside the weights."""
    size, blocks = path_dtype(model).itemsize, blocks_of(model, layers)
    each = [_block_bytes(members, shape, size, chosen_experts(model)) for members in blocks.values()]
    kept = sum(x.kept for x in each)
    whole, largest = sum(x.whole for x in each), max((x.whole for x in each), default=0)
    backward = min(whole, ROOM_BYTES + kept + largest)
    words = _words(model)
    logits = LOGIT_BYTES * shape.samples * shape.answer_tokens * words
    doubled = 2 * shape.samples * shape.tokens * words * size  # both models side by side, at all positions
    return max(backward + logits, largest + doubled)


def calibration_bytes(layers: Iterable[Linear]) -> int:
    """Bytes of rounding the widest layer, with its Gram matrix in float32."""
    device = torch.device("cuda")

    def needed(x: Linear) -> int:
        grams = (x.experts or 1) * gram_bytes(x.in_features, device)
        return rounding_bytes(x.out_features, x.in_features) + grams

    return max((needed(x) for x in layers if not x.fixed), default=0)


@dataclass(frozen=True)
class _BlockBytes:
    """kept: by a block that runs again in the backward pass. whole: by one that does not, or runs now."""

    kept: int
    whole: int


def _block_bytes(layers: list[Linear], shape: BatchShape, size: int, experts: int) -> _BlockBytes:
    rows = shape.samples * (shape.vision_rows if layers[0].tower == VISION else shape.tokens)
    whole = 0
    for x in layers:
        own = shape.samples * shape.rows_read(x) * (experts if x.experts else 1)
        whole += size * 2 * (own * (x.in_features + x.out_features) + prod(x.shape))
    return _BlockBytes(KEPT_OF_A_ROW * rows * layers[0].in_features * size, whole)


def blocks_of(model: nn.Module, layers: Iterable[Linear]) -> Mapping[int, list[Linear]]:
    """The layers of each repeated block that is counted apart, in their order."""
    number = {id(m): i for i, block in enumerate(repeated_blocks(model)) for m in block.modules()}
    found: dict[int, list[Linear]] = {}
    for x in layers:
        owner = x.name if x.experts is None else x.name.rpartition(".")[0]
        block = number.get(id(model.get_submodule(owner)))
        if block is not None:
            found.setdefault(block, []).append(x)
    return found


def chosen_experts(model: nn.Module) -> int:
    """How many experts each token goes to, where the config says it."""
    config: Any = model.config
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in ("num_experts_per_tok", "top_k_experts"))
    return next((x for x in named if isinstance(x, int)), 1)


def _words(model: Any) -> int:
    """Size of the vocabulary that logits are over; 0 without a head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return 0 if head is None else head.weight.shape[0]
