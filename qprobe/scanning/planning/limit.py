"""Whether a scan fits where it is to run; where it does not, its weights wait on the host by themselves."""

from __future__ import annotations

from dataclasses import replace

import torch

from qprobe.calibration.planned.limit import GIB, USED, needed_beyond, shape_of_batch
from qprobe.errors import MachineError
from qprobe.loading.device import pick_device
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.spread import devices_for, free_bytes, needed_bytes, room_for_weights
from qprobe.measure.memory import free_memory, held_bytes
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.process import Process
from qprobe.scanning.samples import Chosen
from qprobe.system.devices import SPREAD, AskedDevice


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
    need = needed_beyond(
        free,
        skeleton,
        asked.format,
        lambda: shape_of_batch(skeleton.config, chosen.processed, chosen.samples, asked.batching),
    )
    if need is None:
        return asked
    if _can_spread(skeleton, device, place):
        return replace(asked, device=replace(asked.device, kind=SPREAD))
    limit = int(USED * free) + held_bytes(place)
    why = (
        f"{place} has {free / GIB:.1f} GiB free, and with all weights on it this scan would take about "
        f"{need / GIB:.1f} GiB, so they wait on the host, as with --max-memory {limit // 2**20}MiB."
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
