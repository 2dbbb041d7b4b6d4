"""Processor inputs of single rows -> those of a batch, as the processor itself would pad them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qprobe.errors import SampleError

# Tensors with a token axis; all others belong to images and decide which samples fit one batch.
TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask"}
VIDEOS = "pixel_values_videos"  # whose frames are one axis where a model does not cut them into patches
PER_IMAGE = "cross_attention_mask"  # what each text token sees of each image: a row of text alone has none

Inputs = dict[str, Tensor]
Side = Literal["left", "right"]


def joined(found: Sequence[Inputs], side: Side, pad_id: int) -> Inputs:
    """The inputs of a batch. Its rows read as they do alone: an image keeps its tokens and its pixels.

    found: of each row by itself, (1, tokens, ...) and images. Texts are padded on `side`, images of several
    sizes or numbers of tiles with zeros behind. Raises SampleError for rows with and without an image where
    the model needs a mask of images for each row, and for videos of several numbers of frames where it would
    read the zeros.
    """
    keys = {key: None for inputs in found for key in inputs}
    if PER_IMAGE in keys and any(PER_IMAGE not in x for x in found):
        raise SampleError(
            "a batch mixes lines with and without an image, which the model does not take; pass "
            "--batch-size 1"
        )
    if len({x[VIDEOS].shape[1:] for x in found if VIDEOS in x}) > 1:
        raise SampleError(
            "a batch mixes videos of several numbers of frames, which the model does not take; pass "
            "--batch-size 1"
        )
    length = max(x["input_ids"].shape[1] for x in found)
    return {key: _joined(key, found, length, side, pad_id) for key in keys}


def stacked(found: Sequence[Inputs]) -> Inputs:
    """The inputs of a batch of images alone, (1, ...) each. Raises SampleError if their shapes differ."""
    if any({k: v.shape for k, v in x.items()} != {k: v.shape for k, v in found[0].items()} for x in found):
        raise SampleError("a batch mixes images of several processed shapes; pass --batch-size 1")
    return {key: torch.cat([x[key] for x in found]) for key in found[0]}


def _joined(key: str, found: Sequence[Inputs], length: int, side: Side, pad_id: int) -> Tensor:
    if key not in TEXT_KEYS:
        return torch.cat(_of_one_shape(key, [x[key] for x in found if key in x]))
    given = [x[key] if key in x else torch.zeros_like(x["input_ids"]) for x in found]
    return torch.cat([_padded(x, key, length, side, pad_id) for x in _of_one_shape(key, given, axes=2)])


def _of_one_shape(key: str, values: Sequence[Tensor], axes: int = 1) -> list[Tensor]:
    """`values` with zeros behind, so that all axes but the first `axes` are equally long."""
    shapes = {x.shape[axes:] for x in values}
    if len(shapes) == 1 or len({len(x) for x in shapes}) > 1:
        return list(values)
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    found = []
    for value in values:
        missing = [n - size for n, size in zip(longest, value.shape[axes:], strict=True)]
        padded = F.pad(value, [x for n in reversed(missing) for x in (0, n)])
        if key == "aspect_ratio_mask":  # Mllama: an image that is not there has one tile
            padded[:, value.shape[1] :, 0] = 1
        found.append(padded)
    return found


def _padded(value: Tensor, key: str, length: int, side: Side, pad_id: int) -> Tensor:
    """`value`, (1, tokens, ...), with pads up to `length` tokens."""
    missing = length - value.shape[1]
    if not missing:
        return value
    if key == PER_IMAGE and side == "right":
        pads = value[:, -1:].expand(-1, missing, *value.shape[2:])  # pads see what the last token sees
    else:
        shape = (1, missing, *value.shape[2:])
        pads = torch.full(shape, pad_id if key == "input_ids" else 0, dtype=value.dtype)
    return torch.cat([pads, value] if side == "left" else [value, pads], dim=1)
