"""Weight error straight from a checkpoint's files, one tensor at a time, for models that fit nowhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open

from qprobe.errors import ModelError
from qprobe.formats.chunks import roundtrip_parts
from qprobe.formats.nf4 import Nf4
from qprobe.measure.weights import COLUMNS, error_sums, weight_row
from qprobe.records import ErrorSums

_WINDOWS, _WINDOW = (
    16,
    256,
)  # of each tensor, what enters the digest: a page each, so that it costs no reading


def file_rows(
    path: Path, weights: Mapping[str, str], fmt: Nf4, device: torch.device, dtype: torch.dtype
) -> pd.DataFrame:
    """Rows of the unit stage "weights" for the linears whose weights lie in one file.

    weights: linear -> name of its weight in the file. The same numbers as of the loaded model, which holds
    them in `dtype`. Holds one tensor, as mapped from the file, its codes, and little more.
    """
    rows = []
    for layer, name in weights.items():
        total, peak = ErrorSums(), 0.0
        for wanted, got in roundtrip_parts(_tensor(path, name), fmt, device, dtype):
            sums, largest = error_sums(wanted, got)
            total, peak = total + sums, max(peak, largest)
        rows.append(weight_row(layer, total, peak))
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


def files_digest(folder: Path, weights: Sequence[tuple[str, str]]) -> str:
    """SHA-256 over evenly spaced parts of the tensors `weights`: (file, name of the tensor)."""
    sha = hashlib.sha256()
    for file, name in weights:
        flat = _tensor(folder / file, name).reshape(-1)
        step = max(_WINDOW, flat.numel() // _WINDOWS)
        sha.update(f"{name} {tuple(flat.shape)} {flat.dtype}".encode())
        for start in range(0, flat.numel(), step):
            sha.update(flat[start : start + _WINDOW].contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _tensor(path: Path, name: str) -> Any:
    """One tensor, mapped from its file: pages are read as they are used, and given back with the tensor."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.get_tensor(name)
    except Exception as error:  # safetensors raises its own error, which is no public class of every version
        raise ModelError(f"{name} cannot be read from {path} ({error}). Copy the file again.") from error
