"""Peak memory so far, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

_earlier: dict[torch.device, int] = {}  # the highest peak of each CUDA device before its last restart


def peak_bytes(device: torch.device, since_restart: bool = False) -> int:
    """The most memory held at once: allocated on a CUDA `device`, or resident in this process.

    since_restart: from the last `restart_peak` on, and not from the start of the process.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        return peak if since_restart else max(peak, _earlier.get(device, 0))
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with the peak of the process that started this one
        found = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), None)
        if found is not None:
            return int(found.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # others count in KiB


def restart_peak(device: torch.device) -> None:
    """Begin a new peak on a CUDA `device`; a process's own peak cannot begin anew."""
    if device.type == "cuda":
        _earlier[device] = peak_bytes(device)
        torch.cuda.reset_peak_memory_stats(device)


def held_bytes(device: torch.device) -> int:
    """Memory held now: allocated on a CUDA `device`, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
