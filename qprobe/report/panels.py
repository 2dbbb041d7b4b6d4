"""What every picture of layers shares: its panels, the towers as bands, and which layers stand out."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd

from qprobe.registry.measures import Column, columns

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


_NARROW = 18  # characters beside a panel


def panel_columns() -> list[Column]:
    """The measured columns that are drawn, from top to bottom."""
    return [x for x in columns() if x.has_panel]


def figure_label(column: Column) -> str:
    """What stands beside the panel of `column`, in two lines: its label and its unit."""
    if len(column.label) <= _NARROW:
        return f"{column.label}\n({column.unit})"
    return fill(f"{column.label} ({column.unit})", _NARROW)


def taken(tables: Sequence[pd.DataFrame]) -> list[Column]:
    """Those of the panels whose column holds a number in at least one of `tables`."""
    return [p for p in panel_columns() if any(p.name in t and t[p.name].notna().any() for t in tables)]


def spike_indices(table: pd.DataFrame, panel: Column) -> list[int]:
    """Indices of the layers that stand out most, at most `LABELLED_SPIKES`, the biggest first.

    A spike is what Tukey called far out: above the upper quartile plus 3 times the distance of the quartiles,
    taken on the scale that is drawn (1.5 times would name two of 600 layers that differ by chance). On a
    linear scale it must also be tall enough to be seen.
    """
    values = table[panel.name].to_numpy(float)
    drawn = np.isfinite(values) & (values > 0)
    if not drawn.any():
        return []
    scaled = np.log(np.where(drawn, values, np.nan)) if panel.is_log else np.where(drawn, values, np.nan)
    fence = upper_fence(scaled)
    if not panel.is_log:
        fence = max(fence, LEAST_HEIGHT * float(values[drawn].max()))
    spikes = np.flatnonzero(drawn & (np.nan_to_num(scaled, nan=-np.inf) > fence))
    return [int(i) for i in spikes[np.argsort(-values[spikes], kind="stable")][:LABELLED_SPIKES]]


def list_name(name: str) -> str:
    """What a list is called where it is drawn: the name of its measure in place of the column's."""
    column = next((x for x in columns() if x.is_shown and x.name in name), None)
    return name if column is None else name.replace(column.name, column.label)


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
