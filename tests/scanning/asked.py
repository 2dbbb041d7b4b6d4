"""What the tests of a scan ask for: little of everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qprobe.options import ScanOptions
from qprobe.scanning.result import ScanResult

TinyFolder = Callable[[str], Path]
Scanned = Callable[[str], ScanResult]


def options(folder: Path, out: Path, **changes: Any) -> ScanOptions:
    return replace(ScanOptions(str(folder), samples=6, max_new_tokens=5, device="cpu", out=out), **changes)


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path
