"""Weight error straight from a checkpoint's files, one tensor at a time, for models that fit nowhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qprobe.errors import ModelError
from qprobe.formats.protocol import Format
from qprobe.loading.experts.stored import StoredExperts
from qprobe.measure.weights import WeightRow, error_sums, rows_by_expert, weight_row
from qprobe.records import ErrorSums

_PART = 2**22  # elements that enter the digest at once


def file_rows(
    path: Path, weights: Mapping[str, str], fmt: Format, device: torch.device, dtype: torch.dtype
) -> list[WeightRow]:
    """Rows of `weight_frame` for the linears whose weights lie in one file.

    weights: linear -> name of its weight in the file. The same as of the loaded model, which holds them in
    `dtype`, but for the order in which float64 sums are added up. Holds the 4-bit codes of one tensor and a
    few parts of it; its pages of the file are mapped meanwhile.
    """
    rows = []
    for layer, name in weights.items():
        total, peak = ErrorSums(), 0.0
        with open_tensor(path, name) as stored:
            cuts = fmt.row_parts(tuple(stored.get_shape()))
            parts = [partial(stored.__getitem__, cut) for cut in cuts]
            for wanted, got in fmt.dequantized_parts(parts, device, dtype):
                sums, largest = error_sums(wanted, got)
                total, peak = total + sums, max(peak, largest)
        rows.append(weight_row(layer, total, peak))
    return rows


def expert_rows(
    weight: StoredExperts, files: Mapping[str, Path], fmt: Format, device: torch.device, dtype: torch.dtype
) -> list[WeightRow]:
    """Rows of `weight_frame`, one per expert, for one fused weight; files: of its pieces.

    The same as of the loaded model, to the digit: scales of a whole weight are quantized together, so it is
    held whole.
    """

    def piece(name: str) -> Tensor:
        with open_tensor(files[name], name) as stored:
            return stored[:].to(device=device, dtype=dtype)

    own = weight.read(piece)
    return rows_by_expert(weight.name, own, fmt.pack(own).unpack())


def files_digest(folder: Path, weights: Sequence[tuple[str, str]]) -> str:
    """SHA-256 over all of the tensors `weights`: (file, name of the tensor)."""
    sha = hashlib.sha256()
    for file, name in weights:
        with open_tensor(folder / file, name) as stored:
            shape = stored.get_shape()
            sha.update(f"{name} {shape} {stored.get_dtype()}".encode())
            rows = max(1, _PART // max(1, prod(shape[1:])))
            for row in range(0, shape[0], rows):
                sha.update(stored[row : row + rows].contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


@contextmanager
def open_tensor(path: Path, name: str) -> Iterator[Any]:
    """One tensor in its file, to be read by rows: stored[3:5]; the file is unmapped afterwards.

    Raises ModelError if the file or the tensor cannot be read.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{name} cannot be read from {path} ({error}). Copy the file again.") from error
