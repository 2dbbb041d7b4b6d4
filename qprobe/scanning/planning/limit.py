"""Whether a scan fits where it is to run; where it does not, its weights wait on the host by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qprobe.errors import MachineError
from qprobe.inputs.answers import Batching
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.device import pick_device
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.spread import devices_for, free_bytes, needed_bytes, room_for_weights
from qprobe.measure.memory import free_memory, held_bytes
from qprobe.records import Sample, Video
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.planning.memory import BatchShape, device_need, weight_bytes
from qprobe.scanning.process import Process
from qprobe.scanning.samples import Chosen
from qprobe.system.devices import SPREAD, AskedDevice

GIB = 2**30
USED = 0.9  # of what is free; the rest is for the gaps between allocations, and for libraries
SURE_BYTES = 12 * GIB  # beside the weights, which no batch of the default size took (reports/full-size)


def within_memory(skeleton: Skeleton, asked: ScanRequest, chosen: Chosen, process: Process) -> ScanRequest:
    """`asked`, with a memory limit where its device has no room for the default scan, and why.

    Where several GPUs together have room the model is spread over them instead. Nothing is changed where a
    limit or all GPUs were asked for, or the model is loaded already.
    """
    given = asked.max_memory_bytes is not None or asked.loaded is not None
    device = devices_for(process.shard, asked.device)
    if given or device.kind == SPREAD or not skeleton.is_buildable:
        return asked
    place = pick_device(device.one)
    free = free_memory(place) // (process.shard.local_world or 1 if place.type == "cpu" else 1)
    layers = skeleton.inventory(asked.format).layers
    if weight_bytes(skeleton.model, layers, asked.format) + SURE_BYTES <= free:
        return asked
    shape = shape_of_batch(skeleton.config, chosen.processed, chosen.samples, asked.batching)
    need = device_need(skeleton, asked.format, shape)
    if need.total <= USED * free:
        return asked
    if _can_spread(skeleton, device, place):
        return replace(asked, device=replace(asked.device, kind=SPREAD))
    limit = int(USED * free) + held_bytes(place)
    why = (
        f"{place} has {free / GIB:.1f} GiB free, and with all weights on it this scan would take about "
        f"{need.total / GIB:.1f} GiB, so they wait on the host, as with --max-memory {limit // 2**20}MiB."
    )
    return replace(asked, max_memory_bytes=limit, why_limited=why)


def _can_spread(skeleton: Skeleton, device: AskedDevice, place: torch.device) -> bool:
    """True if there are several GPUs to lay the model over, which together have room for it."""
    cards = device.cards or tuple(range(torch.cuda.device_count()))
    if not device.may_be_all or place.type != "cuda" or len(cards) < 2:
        return False
    try:
        room_for_weights(needed_bytes(skeleton.model), free_bytes(cards))
    except MachineError:
        return False
    return True


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
