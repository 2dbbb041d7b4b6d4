"""Several processes that train one adapter, a device each: the first one reads and writes for all."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from traceback import clear_frames
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qprobe.errors import MachineError, RunError
from qprobe.loading.device import pick_device
from qprobe.loading.spread import device_of
from qprobe.system.devices import BEST, SPREAD, AskedDevice
from qprobe.system.processes import Shard, shard_from

T = TypeVar("T")
WAIT = timedelta(hours=6)  # how long the others wait: the first process checks every line and image for all
_TORCHRUN = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets beside RANK and WORLD_SIZE
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
"""In what torch raises where another process is gone."""


@dataclass(frozen=True)
class Group:
    """The processes of one training, of which this is one. device: its own."""

    shard: Shard
    device: AskedDevice

    @property
    def is_first(self) -> bool:
        """True for the process that reads the data and writes the folder."""
        return self.shard.rank == 0

    @property
    def size(self) -> int:
        return self.shard.world

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them; the others wait for it."""
        found: list[Any] = [make() if self.is_first else None]
        if self.size > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]


@contextmanager
def together(environment: Mapping[str, str], asked: AskedDevice) -> Iterator[Group]:
    """The processes that torchrun started, connected while it lasts; this one alone without torchrun.

    asked: the device that the user named. Raises MachineError for variables or a device that do not fit
    several processes, RunError where another process ended too early.
    """
    shard = shard_from(environment)
    _refuse_apart(environment, shard, asked)
    group = Group(shard, device_of(shard, asked))
    if shard.local is None or dist.is_initialized():
        yield group
        return
    device = pick_device(group.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", timeout=WAIT)
    try:
        with _own_number(device):
            yield group
        dist.barrier()  # none closes its connections before all have what was sent
    except BaseException as error:
        clear_frames(error.__traceback__)
        if not isinstance(error, RuntimeError) or not any(x in str(error) for x in _LOST):
            raise
        raise RunError(
            f"Another one of the {shard.world} processes of this training ended, so this one did too. That "
            "one says why; the same command goes on from the last checkpoint."
        ) from error
    finally:
        # The reducer of DistributedDataParallel must not be the last to hold the group: it would wait for the
        # group's threads with the interpreter locked, which those threads may need (torch 2.13).
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def _own_number(device: torch.device) -> Iterator[None]:
    """While open, LOCAL_RANK is the number of the GPU `device`, which accelerate takes it for.

    Where a scheduler shows each process its own GPU alone, that is 0 in all of them.
    """
    before = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or before is None:
        yield
        return
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


def _refuse_apart(environment: Mapping[str, str], shard: Shard, asked: AskedDevice) -> None:
    """Raises MachineError where the processes cannot find each other, or have no device of their own."""
    if asked.kind == SPREAD:
        raise MachineError(
            "--device auto spreads a model for a scan. To train, each card holds the whole model: the cards "
            "of a spread one would wait for each other, so none is trained here. Leave --device out; "
            "`qprobe plan --training` says what a card must hold, and torchrun trains on several."
        )
    missing = [name for name in _TORCHRUN if not environment.get(name, "").strip()]
    is_started = not shard.is_alone or "LOCAL_RANK" not in missing
    if is_started and (missing or shard.local is None):
        raise MachineError(
            "The variables of torchrun are set in part, so the processes of a training cannot find each "
            f"other (not set: {', '.join(missing) or 'RANK, WORLD_SIZE'}). Start it with `torchrun "
            "--nproc-per-node N -m qprobe finetune ...`, or unset RANK, WORLD_SIZE and LOCAL_RANK."
        )
    if not shard.is_alone and asked not in (BEST, AskedDevice("cuda"), AskedDevice("cpu")):
        raise MachineError(
            f"--device {asked} is one device, and {shard.world} processes train here, each on a GPU of its "
            "own. Leave --device out; CUDA_VISIBLE_DEVICES chooses the GPUs."
        )
