"""What the tests of a scan ask for: little of everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qprobe
from qprobe.scanning.run import ScanResult

TinyFolder = Callable[[str], Path]
Scanned = Callable[[str], ScanResult]


def scan(*model: Any, **asked: Any) -> ScanResult:
    """What a scan found."""
    return qprobe.scan(*model, **asked).result


def options(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """The keyword arguments of a scan of the model in `folder`."""
    few = {"samples": 6, "max_new_tokens": 5}
    return {"model": str(folder), "device": "cpu", "out": out, **few, **changes}


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path
