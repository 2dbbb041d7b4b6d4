"""Whether a model fits where it is to be measured, with its 4-bit form and a batch of samples beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from qprobe.calibration.planned.memory import BatchShape, device_need, weight_bytes
from qprobe.inputs.answers import Batching
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.skeleton import Skeleton
from qprobe.records import FormatSpec, Sample, Video

GIB = 2**30
USED = 0.9  # of what is free; the rest is for the gaps between allocations, and for libraries
SURE_BYTES = 12 * GIB  # beside the weights, which no batch of the default size took (reports/full-size)


def needed_beyond(
    free_bytes: int, skeleton: Skeleton, fmt: FormatSpec, shape: Callable[[], BatchShape]
) -> int | None:
    """Bytes that measuring takes with all weights on a device; None where `free_bytes` have room for that.

    shape: gives that of the largest batch, if it has to be known.
    """
    layers = skeleton.inventory(fmt).layers
    if weight_bytes(skeleton.model, layers, fmt) + SURE_BYTES <= free_bytes:
        return None
    need = device_need(skeleton, fmt, shape()).total
    return None if need <= USED * free_bytes else need


def shape_of_batch(
    config: Any, processed: ProcessedSamples, samples: Sequence[Sample], batching: Batching
) -> BatchShape:
    """The shape of the largest batch of `samples`, with answers as long as they may be where there are none.

    The largest is the one that shows most and has the longest text.
    """
    group = max(processed.batches(samples, batching.size), key=_shown_and_said)
    has_answers = all(s.answer is not None for s in group)
    if has_answers:
        batch = processed.batch(group)
        inputs, answers = batch.inputs, max(end - start for start, end in batch.answers)
    else:  # of which the prompts are held, and not what texts with answers would be
        inputs, answers = processed.prompts(group), batching.max_new_tokens
    read = max((inputs[x].shape[1] for x in _SEQUENCES if x in inputs), default=0)
    tokens = read + (0 if has_answers else answers)
    return BatchShape(len(group), tokens, answers, _vision_rows(config, inputs) // len(group))


_SEQUENCES = ("input_ids", "decoder_input_ids")  # an encoder of images alone has no first one
_PIXELS = ("pixel_values", "pixel_values_videos")


def _shown_and_said(group: Sequence[Sample]) -> tuple[int, int]:
    """(images and frames of `group`, characters that it has once all texts are as long as the longest)."""
    frames = sum(len(x.frames) if isinstance(x, Video) else 1 for s in group for x in s.seen)
    lengths = (len(s.answer or "") + sum(len(turn.text) for turn in s.turns) for s in group)
    return frames, len(group) * max(lengths)


def _vision_rows(config: Any, inputs: dict[str, Tensor]) -> int:
    """Patches of all images and frames of a batch, by their pixels."""
    vision = getattr(config, "vision_config", None)
    patch = getattr(vision, "patch_size", None)
    if not isinstance(patch, int):
        return 0
    frames = getattr(vision, "temporal_patch_size", 1)
    shown = [inputs[x] for x in _PIXELS if x in inputs]
    return sum(x.numel() // (3 * patch**2 * (frames if x.dim() == 2 else 1)) for x in shown)
