"""What every picture of layers shares: the measures, the towers as bands, and which layers stand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

# Okabe and Ito's colours, told apart with every common colour blindness.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
GREY = "#777777"
TOWER_TINTS = {
    "vision": SKY,
    "projector": GREEN,
    "cross_attention": ORANGE,
    "language": "#BBBBBB",
    "other": PURPLE,
}
LABELLED_SPIKES = 12  # a panel at most; those that find no room stay without a name
LEAST_HEIGHT = 0.05  # of the tallest spike of a linear panel; below, a point lies on the axis


# Column of the layer table -> its heading, its unit, and what it says; shown in this order.
MEASURES = {
    "weight_nmse": ("weight error", "nmse", "squared error of the 4-bit weights / their squares"),
    "weight_peak": ("largest weight error", "max |D|", "of all weights; D is 4-bit minus 16-bit"),
    "activation_nmse": (
        "activation error",
        "nmse",
        "squared error of the output, with 4-bit in this layer alone / its squares",
    ),
    "activation_peak": ("largest activation error", "max |D x|", "of all tokens and outputs"),
    "propagated_nmse": (
        "propagated error",
        "nmse",
        "squared error of the output, with 4-bit in every layer / its squares",
    ),
    "sensitivity_kl": (
        "sensitivity",
        "nats / answer token",
        "share of the KL of standard 4-bit that this layer causes",
    ),
    "isolated_kl": (
        "isolated KL",
        "nats / answer token",
        "KL with 4-bit in this layer alone, to second order",
    ),
}


@dataclass(frozen=True)
class Panel:
    """One measure of the layer table and how it is drawn."""

    column: str
    label: str
    what: str
    log: bool = True
    error_column: str | None = None


PANELS = (
    Panel("weight_nmse", "weight error\n(nmse)", "weight error"),
    Panel("activation_nmse", "activation error\n(nmse)", "activation error"),
    Panel("activation_peak", "largest activation\nerror (max |D x|)", "activation peak"),
    Panel("propagated_nmse", "propagated error\n(nmse)", "propagated error"),
    Panel(
        "sensitivity_kl",
        "sensitivity\n(nats / answer token)",
        "sensitivity",
        log=False,
        error_column="sensitivity_kl_se",
    ),
)


def taken(tables: Sequence[pd.DataFrame]) -> list[Panel]:
    """The panels whose measure holds a number in at least one of `tables`."""
    return [p for p in PANELS if any(p.column in t and t[p.column].notna().any() for t in tables)]


def spike_indices(table: pd.DataFrame, panel: Panel) -> list[int]:
    """Indices of the layers that stand out most, at most `LABELLED_SPIKES`, the biggest first.

    A spike is what Tukey called far out: above the upper quartile plus 3 times the distance of the quartiles,
    taken on the scale that is drawn (1.5 times would name two of 600 layers that differ by chance). On a
    linear scale it must also be tall enough to be seen.
    """
    values = table[panel.column].to_numpy(float)
    drawn = np.isfinite(values) & (values > 0)
    if not drawn.any():
        return []
    scaled = np.log(np.where(drawn, values, np.nan)) if panel.log else np.where(drawn, values, np.nan)
    fence = upper_fence(scaled)
    if not panel.log:
        fence = max(fence, LEAST_HEIGHT * float(values[drawn].max()))
    spikes = np.flatnonzero(drawn & (np.nan_to_num(scaled, nan=-np.inf) > fence))
    return [int(i) for i in spikes[np.argsort(-values[spikes], kind="stable")][:LABELLED_SPIKES]]


def list_name(name: str) -> str:
    """What a list is called where it is drawn: the name of its measure in place of the column's."""
    column = next((c for c in MEASURES if c in name), "")
    return name.replace(column, MEASURES[column][0]) if column else name


def upper_fence(values: np.ndarray) -> float:
    """Tukey's upper outer fence of the values that are not NaN."""
    low, high = np.nanquantile(values, [0.25, 0.75])
    return float(high + 3 * (high - low))


def tower_runs(towers: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of neighbours in one tower: (tower, first index, last index)."""
    runs: list[tuple[str, int, int]] = []
    for i, tower in enumerate(towers):
        if runs and runs[-1][0] == tower:
            runs[-1] = (tower, runs[-1][1], i)
        else:
            runs.append((tower, i, i))
    return runs


def tower_spans(towers: Sequence[str]) -> list[tuple[str, int, int]]:
    """(tower, first layer, last layer) of each tower; interleaved towers share a span and a name."""
    ends: dict[str, tuple[int, int]] = {}
    for tower, first, last in tower_runs(towers):
        ends[tower] = (ends.get(tower, (first, last))[0], last)
    spans: list[tuple[str, int, int]] = []
    for tower, (first, last) in sorted(ends.items(), key=lambda item: item[1]):
        if spans and first <= spans[-1][2]:
            names, start, end = spans[-1]
            spans[-1] = (f"{names}, {tower}", start, max(end, last))
        else:
            spans.append((tower, first, last))
    return spans
