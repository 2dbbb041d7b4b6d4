"""What a training is asked, in typed values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.manifest.records import Manifest
from qprobe.options import FinetuneOptions, Progress
from qprobe.system.devices import AskedDevice
from qprobe.training.together import Group


@dataclass(frozen=True)
class Training:
    """One training, of which this process is one of `group`.

    options: words and numbers that need no reading; the other fields take the place of those that do.
    manifest: what the adapter goes on, from `folder`. data, eval_data: files, ids, or rows in memory.
    """

    options: FinetuneOptions
    manifest: Manifest
    folder: Path
    data: Any
    eval_data: Any
    out: Path
    group: Group
    progress: Progress

    @property
    def device(self) -> AskedDevice:
        """That of this process."""
        return self.group.device
