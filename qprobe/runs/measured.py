"""What the tables of a run are derived from: a run folder as they see it; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pandas as pd

from qprobe.records import Inventory
from qprobe.runs.derived import DerivedFiles
from qprobe.runs.key import Key


class Measured(Protocol):
    """A run with finished units, which `qprobe.runs.folder.RunFolder` is."""

    path: Path
    files: DerivedFiles

    @property
    def key(self) -> Key:
        """What decides every number."""
        ...

    @property
    def measured_inventory(self) -> Inventory:
        """Every linear in the order in which they ran; those that never ran come last."""
        ...

    def units(self, stage: str) -> pd.DataFrame:
        """All finished units of `stage` in unit order."""
        ...
