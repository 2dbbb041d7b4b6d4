"""What a benchmark was made with, for the line above its figures."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from qprobe.loading.device import pick_device
from qprobe.system.devices import parse_device


def made_with(device: str | None) -> str:
    """Hardware and versions in one line."""
    where = pick_device(parse_device(device))
    hardware = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu_name()
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return ", ".join((hardware, *(f"{x} {version(x)}" for x in packages)))


def cpu_name() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return next(names, platform.machine())
