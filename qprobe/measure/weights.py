"""Weight error: what 4-bit storage does to each weight alone."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from qprobe.measure.dequantized import DequantizedWeights
from qprobe.records import ErrorSums

COLUMNS = ["layer", "expert", "n", "signal", "noise", "nonfinite", "peak"]
# Elements that are taken to float64 at once: three copies of what fits a CPU's cache, or 0.4 GB on a GPU.
_PART = {"cpu": 2**18, "cuda": 2**24}


def error_sums(reference: Tensor, approximation: Tensor) -> tuple[ErrorSums, float]:
    """(sums, peak) of the error of `approximation`; same shape, summed in float64.

    Non-finite pairs are counted, not summed. Peak is the largest absolute error, 0.0 if nothing is finite.
    """
    assert reference.shape == approximation.shape
    size = _PART.get(reference.device.type, 2**22)
    total, peak = ErrorSums(), 0.0
    parts = (x.detach().reshape(-1).split(size) for x in (reference, approximation))
    for wanted, got in zip(*parts, strict=True):
        sums, largest = _part_sums(wanted.double(), got.double())
        total, peak = total + sums, max(peak, largest)
    return total, peak


def _part_sums(wanted: Tensor, got: Tensor) -> tuple[ErrorSums, float]:
    """`error_sums` of flat float64 tensors."""
    error, count = got - wanted, wanted.numel()
    if not torch.isfinite(error.sum()):
        finite = torch.isfinite(wanted) & torch.isfinite(got)
        wanted, error = wanted[finite], error[finite]
    if not wanted.numel():
        return ErrorSums(nonfinite=count), 0.0
    signal, noise = float(torch.dot(wanted, wanted)), float(torch.dot(error, error))
    sums = ErrorSums(wanted.numel(), signal, noise, count - wanted.numel())
    return sums, float(error.abs_().max())


WeightRow = tuple[str, int | None, int, float, float, int, float]


def weight_row(layer: str, sums: ErrorSums, peak: float, expert: int | None = None) -> WeightRow:
    """One row of the unit stage "weights", in the order of `COLUMNS`; expert: None for a plain linear."""
    return layer, expert, sums.n, sums.signal, sums.noise, sums.nonfinite, peak


def rows_by_expert(layer: str, own: Tensor, weight_hat: Tensor) -> list[WeightRow]:
    """One row per expert of a fused weight and its 4-bit form."""
    pairs = enumerate(zip(own, weight_hat, strict=True))
    return [weight_row(layer, *error_sums(w, w_hat), expert) for expert, (w, w_hat) in pairs]


def weight_frame(rows: list[WeightRow]) -> pd.DataFrame:
    """`rows` of `weight_row` as the frame of a unit."""
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS)).astype({"expert": "Int64"})


def weight_rows(dequantized: DequantizedWeights) -> pd.DataFrame:
    """One row per linear, and one per expert of a fused weight, columns of the unit stage "weights"."""
    rows = []
    for name in dequantized.modules:
        own, weight_hat = dequantized.own(name), dequantized.weight(name)
        if own.dim() == 2:
            rows.append(weight_row(name, *error_sums(own, weight_hat)))
        else:
            rows += rows_by_expert(name, own, weight_hat)
    return weight_frame(rows)
