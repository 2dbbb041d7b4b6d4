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
from qprobe.records import Sample
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.planning.memory import BatchShape, device_need, weight_bytes
from qprobe.scanning.process import Process
from qprobe.scanning.samples import Chosen
from qprobe.system.devices import AskedDevice

GIB = 2**30
USED = 0.9  # of what is free; the rest is for the gaps between allocations, and for libraries
SURE_BYTES = 12 * GIB  # beside the weights, which no batch of the default size took (reports/full-size)


def within_memory(skeleton: Skeleton, asked: ScanRequest, chosen: Chosen, process: Process) -> ScanRequest:
    """`asked`, with a memory limit where its device has no room for the default scan, and why.

    Nothing is changed where a limit or all GPUs were asked for, or the model is loaded already, nor where
    several GPUs together have room.
    """
    given = asked.max_memory_bytes is not None or asked.loaded is not None
    device = devices_for(process.shard, asked.device)
    if given or device.kind == "auto" or not skeleton.is_buildable:
        return asked
    place = pick_device(device.one)
    free = free_memory(place) // (process.shard.local_world or 1 if place.type == "cpu" else 1)
    layers = skeleton.inventory(asked.format).layers
    if weight_bytes(skeleton.model, layers, asked.format) + SURE_BYTES <= free:
        return asked
    shape = shape_of_batch(skeleton.config, chosen.processed, chosen.samples, asked.batching)
    need = device_need(skeleton, asked.format, shape)
    if need.total <= USED * free or _is_spread(skeleton, device, place):
        return asked
    limit = int(USED * free) + held_bytes(place)
    why = (
        f"{place} has {free / GIB:.1f} GiB free, and with all weights on it this scan would take about "
        f"{need.total / GIB:.1f} GiB, so they wait on the host, as with --max-memory {limit // 2**20}MiB."
    )
    return replace(asked, max_memory_bytes=limit, why_limited=why)


def _is_spread(skeleton: Skeleton, device: AskedDevice, place: torch.device) -> bool:
    """True if the model is laid over several GPUs, which have room for it."""
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
    """The shape of the first batch of `samples`, with answers as long as they may be where there are none."""
    group = processed.batches(samples, batching.size)[0]
    has_answers = all(s.answer is not None for s in group)
    if has_answers:
        batch = processed.batch(group)
        inputs, answers = batch.inputs, max(end - start for start, end in batch.answers)
    else:  # of which the prompts are held, and not what texts with answers would be
        inputs, answers = processed.prompts(group), batching.max_new_tokens
    tokens = inputs["input_ids"].shape[1] + (0 if has_answers else answers)
    return BatchShape(len(group), tokens, answers, _vision_rows(config, inputs) // len(group))


def _vision_rows(config: Any, inputs: dict[str, Tensor]) -> int:
    """Patches of all images of a batch, by their pixels."""
    vision, pixels = getattr(config, "vision_config", None), inputs.get("pixel_values")
    patch = getattr(vision, "patch_size", None)
    if pixels is None or not isinstance(patch, int):
        return 0
    frames = getattr(vision, "temporal_patch_size", 1)
    return pixels.numel() // (3 * patch**2 * (frames if pixels.dim() == 2 else 1))
