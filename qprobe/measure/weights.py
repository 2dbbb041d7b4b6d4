"""Weight error: what the 4-bit round trip does to each weight alone."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from qprobe.measure.roundtrips import RoundTrips
from qprobe.records import ErrorSums


def error_sums(reference: Tensor, approximation: Tensor) -> tuple[ErrorSums, float]:
    """(sums, peak) of the error of `approximation`; same shape, summed in float64.

    Non-finite pairs are counted, not summed. Peak is the largest absolute error, 0.0 if nothing is finite.
    """
    assert reference.shape == approximation.shape
    wanted, got = reference.detach().double(), approximation.detach().double()
    finite = torch.isfinite(wanted) & torch.isfinite(got)
    count = int(finite.sum())
    error = torch.where(finite, got - wanted, 0.0)
    signal = torch.where(finite, wanted, 0.0)
    sums = ErrorSums(count, float(signal.square().sum()), float(error.square().sum()), wanted.numel() - count)
    return sums, float(error.abs().max())


def weight_rows(round_trips: RoundTrips) -> pd.DataFrame:
    """One row a linear, columns of the unit stage "weights": layer, n, signal, noise, nonfinite, peak."""
    rows = []
    for name, module in round_trips.modules.items():
        sums, peak = error_sums(module.weight, round_trips.weight(name))
        rows.append((name, sums.n, sums.signal, sums.noise, sums.nonfinite, peak))
    return pd.DataFrame(rows, columns=["layer", "n", "signal", "noise", "nonfinite", "peak"])
