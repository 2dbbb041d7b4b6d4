"""The device that a command runs on, and the 16-bit dtypes."""

from __future__ import annotations

import torch

from qprobe.errors import MachineError
from qprobe.system.devices import SPREAD, AskedDevice
from qprobe.system.wording import counted

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(asked: AskedDevice) -> torch.device:
    """The one device that was asked for; the first CUDA device, or the CPU, for the best there is.

    Raises MachineError if it is not here, and for all GPUs.
    """
    if asked.kind == SPREAD:
        raise MachineError(f"Device {SPREAD!r} is all GPUs, and this runs on one. Use cpu, cuda or cuda:1.")
    if asked.kind is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if asked.kind == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise MachineError(
            f"Device '{asked}' is not here: {counted(count, 'CUDA device')} can be seen, numbered from 0. "
            f"Pass --device {'cuda:0 or ' if count else ''}cpu."
        )
    return torch.device(str(asked))
