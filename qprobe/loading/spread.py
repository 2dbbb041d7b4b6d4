"""Models larger than one GPU: which of them to spread over several, and how accelerate lays them out.

accelerate gives every module a hook that moves its inputs to the GPU where its weights lie, so a spread model
runs as one that is not, a part after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from qprobe.errors import MachineError
from qprobe.system.devices import BEST, SPREAD, AskedDevice
from qprobe.system.processes import Shard

GIB = 2**30
# Two codes a byte and a float32 scale for 64: the 4-bit form beside a 16-bit weight takes 9/32 of it.
FOUR_BIT_SHARE = 9 / 32
# What a batch of the default size took beside the weights of the largest models (reports/full-size).
ROOM_BYTES = 10 * GIB
# The least that must be left beside the weights of one card: its share of a batch, and libraries' workspaces.
LEAST_ROOM_BYTES = 2 * GIB


def free_bytes(cards: Iterable[int]) -> dict[int, int]:
    """Free memory of each of these CUDA devices, by its number."""
    return {i: torch.cuda.mem_get_info(i)[0] for i in cards}


def needed_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, with a 4-bit form beside each; model: may be on the meta device."""
    held = {id(p): p.numel() * p.itemsize for p in model.parameters()}  # tied weights once
    return int(sum(held.values()) * (1 + FOUR_BIT_SHARE))


def is_too_large(needed: int, free: Mapping[int, int], first: int = 0) -> bool:
    """True if a model that takes `needed` bytes does not fit the card `first` with room for a batch."""
    return needed + ROOM_BYTES > free[first]


def room_for_weights(needed: int, free: Mapping[int, int]) -> dict[int | str, int]:
    """Bytes of 16-bit weights that each card may take, as transformers' `max_memory`.

    Raises MachineError if all cards together are too few, with what is needed.
    """
    most = {i: max(0, count - LEAST_ROOM_BYTES) for i, count in free.items()}
    if needed > sum(most.values()):
        one = max(free.values(), default=0) * 9 // 10 // 2**20
        raise MachineError(
            f"The model takes {needed / GIB:.1f} GiB with its 4-bit form beside it, and the {len(free)} GPUs "
            f"here have {sum(most.values()) / GIB:.1f} GiB free for it. Pass --max-memory {one}MiB to stream "
            "its weights from the host's memory, or use more GPUs."
        )
    return {i: int(count / (1 + FOUR_BIT_SHARE)) for i, count in most.items()}


def check_layout(layout: Mapping[str, object]) -> None:
    """Raises MachineError if accelerate left a part of the model on the host; layout: its device map."""
    outside = [name for name, place in layout.items() if place in ("cpu", "disk")]
    if outside:
        raise MachineError(
            f"The GPUs here have no room for the whole model: {outside[0] or 'all of it'} would stay on the "
            "host. Pass --max-memory to stream weights from there, or use more GPUs."
        )


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices that the model's parameters are on, in the order in which they first appear."""
    return tuple(dict.fromkeys(p.device for p in model.parameters()))


def devices_for(shard: Shard, asked: AskedDevice) -> AskedDevice:
    """The device `asked` for as a scan takes it: a model may be spread over the GPUs of this process.

    Where the processes of a machine are fewer than its GPUs, each has as many for itself, those of lower
    LOCAL_RANK the first. Else as of `device_of`, with its errors.
    """
    if shard.local is None or shard.local_world is None or not asked.may_be_all:
        return device_of(shard, asked)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    each = seen // shard.local_world
    if each < 2:
        return device_of(shard, asked)
    return replace(asked, cards=tuple(range(shard.local * each, (shard.local + 1) * each)))


def device_of(shard: Shard, asked: AskedDevice) -> AskedDevice:
    """The device `asked` for; where that leaves the GPU open, the one of this process on its machine.

    A process that sees one GPU only takes that, as schedulers hand them out. Raises MachineError if it
    sees several but none of its number, or if several processes of one machine would each spread over
    all of its GPUs.
    """
    if asked.kind == SPREAD and shard.local is not None and not shard.is_alone:
        raise MachineError(
            "--device auto takes all GPUs of a machine, and torchrun starts several processes there. Start "
            "so few that each has two GPUs or more to itself, or leave out --device."
        )
    if shard.local is None or asked not in (BEST, AskedDevice("cuda")):
        return asked
    if not torch.cuda.is_available():
        return asked
    seen = torch.cuda.device_count()
    if seen > 1 and shard.local >= seen:
        raise MachineError(
            f"LOCAL_RANK={shard.local} asks for the GPU of that number, counted from 0, and this process "
            f"sees {seen}. Start as many processes on a machine as it has GPUs, or name a --device."
        )
    return AskedDevice("cuda", 0 if seen == 1 else shard.local)
