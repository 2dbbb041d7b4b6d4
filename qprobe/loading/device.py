"""The device that a command names, and the 16-bit dtypes."""

from __future__ import annotations

import torch

from qprobe.errors import MachineError
from qprobe.system.wording import counted

SPREAD = "auto"  # the device that is every GPU there is
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str | None) -> torch.device:
    """`device`, or the first CUDA device, or the CPU. Raises MachineError if it cannot be used here."""
    if device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise MachineError(f"Device {device!r} is not a device name. Use cpu, cuda or cuda:1.") from error
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise MachineError(
            f"Device {device!r} is not here: {counted(count, 'CUDA device')} can be seen, numbered from 0. "
            f"Pass --device {'cuda:0 or ' if count else ''}cpu."
        )
    if picked.type not in ("cpu", "cuda"):
        raise MachineError(f"Device {device!r} is not supported. Use cpu or cuda.")
    return picked


def one_device(device: str | None) -> str | None:
    """`device` for what runs on one: the best there is in place of all GPUs."""
    return None if device == SPREAD else device
