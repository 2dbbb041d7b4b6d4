"""What the tests of this folder ask for, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qprobe.scanning.run import ScanResult

TinyFolder = Callable[[str], Path]
Share = Callable[[int, int, Path], ScanResult]


def options(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """The keyword arguments of a scan of the model in `folder`."""
    few = {"samples": 9, "batch_size": 2, "max_new_tokens": 4}
    return {"model": str(folder), "device": "cpu", "out": out, **few, **changes}


def table(run: Path) -> bytes:
    return (run / "layers.csv").read_bytes()


def units(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "units").iterdir()}


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the run but the locks."""
    there = (x for x in run.rglob("*") if x.is_file() and not x.name.startswith(".lock"))
    return {str(x.relative_to(run)): x.read_bytes() for x in there}
