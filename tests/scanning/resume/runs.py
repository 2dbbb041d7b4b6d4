"""What the tests of this folder ask for, and what they read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from qprobe.scanning.run import ScanResult

TinyFolder = Callable[[str], Path]
Share = Callable[..., ScanResult]


class Calibrated(NamedTuple):
    """A finished scan of calibrated weights. asked: `options` that differ from those of a plain one."""

    run: Path
    asked: dict[str, Any]


def options(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """The keyword arguments of a scan of the model in `folder`."""
    few = {"samples": 9, "batch_size": 2, "max_new_tokens": 4}
    return {"model": str(folder), "device": "cpu", "out": out, **few, **changes}


def table(run: Path) -> bytes:
    return (run / "layers.csv").read_bytes()


def manifest(run: Path) -> dict[str, Any]:
    """RUN/skiplist.json, but for the command, which names the folder."""
    return {k: x for k, x in json.loads((run / "skiplist.json").read_text()).items() if k != "made_by"}


def units(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "units").iterdir()}


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the run but the locks."""
    there = (x for x in run.rglob("*") if x.is_file() and not x.name.startswith(".lock"))
    return {str(x.relative_to(run)): x.read_bytes() for x in there}
