"""What a memory limit costs a scan at full size: the same table, and the time that copies alone take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

COPIED = 2**30  # bytes a copy, in pieces of the size of a weight
PIECE = 2**26


def copy_speed(device: torch.device) -> float:
    """Bytes a second from page-locked memory to a CUDA `device`; on a CPU from memory to memory."""
    is_cuda = device.type == "cuda"
    pieces = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(4)]
    for piece in pieces:
        piece.fill_(1)

    def copied() -> None:
        for i in range(COPIED // PIECE):
            piece = pieces[i % len(pieces)]
            if is_cuda:
                piece.to(device, non_blocking=True)
            else:
                piece.clone()

    def seconds() -> float:
        start = time.perf_counter()
        copied()
        if is_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()
    return COPIED / sorted(seconds() for _ in range(5))[2]


def largest_difference(wanted: Path, found: Path) -> dict[str, Any]:
    """Where two layers.csv differ most: |found - wanted| / |wanted| of a number, its column and its layer.

    A value that only one of them has counts as an infinite difference, and so does another text.
    """
    one, other = (pd.read_csv(path).set_index("layer") for path in (wanted, found))
    worst: dict[str, Any] = {"difference": 0.0, "column": "none", "layer": ""}
    if list(one.index) != list(other.index) or list(one.columns) != list(other.columns):
        return {"difference": float("inf"), "column": "layer", "layer": ""}
    for column in one.columns:
        gap = _relative(one[column], other[column])
        if gap.max() > worst["difference"]:
            worst = {"difference": float(gap.max()), "column": column, "layer": str(gap.idxmax())}
    return worst


def column_differences(wanted: Path, found: Path) -> list[dict[str, Any]]:
    """For each numeric column that differs: total (of the sum of all layers, relative), median (of the
    layers, relative) and largest (of a layer, relative to the largest value of the column).
    """
    one, other = (pd.read_csv(path).set_index("layer").sort_index() for path in (wanted, found))
    lines = []
    for column in one.select_dtypes("number").columns:
        a, b = one[column].dropna(), other[column].reindex(one[column].dropna().index)
        if (a != b).any():
            line = {
                "total": abs(b.sum() - a.sum()) / abs(a.sum()),
                "median": _relative(a, b).median(),
                "largest": (b - a).abs().max() / a.abs().max(),
            }
            lines.append({"column": column, **{key: float(value) for key, value in line.items()}})
    return lines


def _relative(wanted: pd.Series, found: pd.Series) -> pd.Series:
    same = (wanted == found) | (wanted.isna() & found.isna())
    if not (pd.api.types.is_numeric_dtype(wanted) and pd.api.types.is_numeric_dtype(found)):
        return (~same).map({True: float("inf"), False: 0.0})
    gap = (found - wanted).abs() / wanted.abs()
    return gap.fillna(float("inf")).mask(same, 0.0)
