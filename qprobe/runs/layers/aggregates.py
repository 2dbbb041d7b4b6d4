"""How a number of the layer table follows from the rows of a layer's units: one function per aggregate.

`qprobe.registry.measures` declares which column takes which. Every ratio is taken once, of sums over all
samples, never as a mean of ratios; sums are `math.fsum`, which rounds once, so neither the order nor the cut
of the units changes a digit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import fsum, nan

import numpy as np

from qprobe.records import ErrorSums
from qprobe.registry.measures import Aggregate, Column
from qprobe.runs.layers.rows import Rows
from qprobe.runs.statistics import ratio_se


@dataclass(frozen=True)
class LayerRows:
    """The rows of one layer in the units of one stage.

    answer_tokens: of every sample that the stage has rows of, whether this layer ran on it or not.
    """

    rows: Rows
    answer_tokens: Mapping[str, int]


Value = tuple[float, float | None]
"""A value and its standard error; None where the aggregate has none."""


def pooled(rows: Rows, prefix: str) -> ErrorSums:
    """The sums of the columns `prefix`n, signal, noise over the rows where they were measured and finite."""
    n, signal, noise = (rows[f"{prefix}{name}"] for name in ("n", "signal", "noise"))
    good = (n > 0) & np.isfinite(signal) & np.isfinite(noise)
    return ErrorSums(int(n[good].sum()), fsum(signal[good].tolist()), fsum(noise[good].tolist()))


def nmse(layer: LayerRows, prefix: str) -> Value:
    """noise / signal over all rows."""
    return pooled(layer.rows, prefix).nmse, None


def sqnr_db(layer: LayerRows, prefix: str) -> Value:
    """The same in decibels."""
    return pooled(layer.rows, prefix).sqnr_db, None


def peak(layer: LayerRows, prefix: str) -> Value:
    """The largest `prefix`peak of the rows in which anything was summed."""
    values = layer.rows[f"{prefix}peak"]
    found = values[np.isfinite(values) & (layer.rows[f"{prefix}n"] > 0)]
    return (float(found.max()) if len(found) else nan), None


def kl_share(layer: LayerRows, column: str) -> Value:
    """What the layer adds to the KL per answer token of all samples, and the standard error of `ratio_se`.

    column: its sums over a sample's answer tokens. Where the layer did not run on a sample it adds nothing;
    samples on which it is not finite are left out.
    """
    rows = layer.rows
    finite = np.isfinite(rows[column]) & (rows["answer_tokens"] > 0)
    found = dict(zip(rows["sample"][finite], rows[column][finite].tolist(), strict=True))
    if not found:
        return nan, nan
    broken = set(rows["sample"]) - found.keys()
    counted = {sample: count for sample, count in layer.answer_tokens.items() if sample not in broken}
    kl = [found.get(sample, 0.0) for sample in counted]
    return fsum(kl) / sum(counted.values()), ratio_se(kl, list(counted.values()))


_AGGREGATES: Mapping[Aggregate, Callable[[LayerRows, str], Value]] = {
    "nmse": nmse,
    "sqnr_db": sqnr_db,
    "peak": peak,
    "kl_share": kl_share,
}


def aggregated(column: Column, layer: LayerRows) -> dict[str, float | None]:
    """The cells of `column`, and of its standard error if it has one, by name."""
    value, error = _AGGREGATES[column.aggregate](layer, column.over)
    return {column.name: value} | ({} if column.error_name is None else {column.error_name: error})
