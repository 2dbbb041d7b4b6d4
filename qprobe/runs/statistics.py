"""Standard errors of what was measured on samples."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, nan, sqrt

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
