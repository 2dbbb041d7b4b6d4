"""Standard errors of what was measured on samples."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, isnan, nan, sqrt

import pandas as pd


def ratio_se(numerators: Sequence[float] | pd.Series, weights: Sequence[float] | pd.Series) -> float:
    """Standard error of sum(numerators) / sum(weights) over n >= 2 samples, else NaN.

    Delta method for a ratio estimator (Cochran 1977, "Sampling Techniques", section 6.4):
    se^2 = n / (n - 1) * sum((x_i - r w_i)^2) / (sum w_i)^2.
    """
    pairs = list(zip(numerators, weights, strict=True))
    if len(pairs) < 2:
        return nan
    total = fsum(w for _, w in pairs)
    ratio = fsum(x for x, _ in pairs) / total
    return sqrt(len(pairs) / (len(pairs) - 1) * fsum((x - ratio * w) ** 2 for x, w in pairs)) / total


def ratio(values: Sequence[float], weights: Sequence[int]) -> tuple[float | None, float | None]:
    """(sum of values / sum of weights, its standard error over samples), None where there are too few.

    Samples with a weight of 0 say nothing and are left out.
    """
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    if not pairs:
        return None, None
    kept_values, kept_weights = zip(*pairs, strict=True)
    error = ratio_se(kept_values, kept_weights)
    return fsum(kept_values) / sum(kept_weights), None if isnan(error) else error
