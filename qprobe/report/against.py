"""The error-spike plot of two runs, or two formats, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qprobe.errors import RunError
from qprobe.registry.measures import Column
from qprobe.report.figures import PAGE, Layout, finished, framed, samples_of, set_scale, stems, with_missing
from qprobe.report.labels import label_points
from qprobe.report.names import plain, short_names
from qprobe.report.panels import BLUE, VERMILION, taken, upper_fence

STYLES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "mfc": BLUE},
    {"color": VERMILION, "marker": "s", "mfc": "none"},
)


@dataclass(frozen=True)
class Side:
    """One of the two runs. name: of the run, its model and format; table: its layers.csv."""

    name: str
    table: pd.DataFrame


def against_plot(first: Side, second: Side, title: str, layout: Layout = PAGE) -> Figure:
    """Both runs in every panel, on the layers they share, in the execution order of the first.

    A panel names the layers that differ most. Raises RunError if the two share no layer.
    """
    tables = _shared(first, second)
    panels = taken(tables)
    figure, axes = framed(tables[0], panels, title, layout)
    for ax, panel in zip(axes, panels, strict=False):
        _draw(ax, tables, panel, layout)
    series = [
        Line2D([], [], ls="", ms=4, label="; ".join([plain(side.name), *samples_of(side.table)]), **style)
        for side, style in zip((first, second), STYLES, strict=True)
    ]
    left_out = len(first.table) + len(second.table) - 2 * len(tables[0])
    facts = f"{left_out} layers that only one run has are left out" if left_out else ""
    finished(figure, axes, tables[0], layout, series, with_missing(facts, panels))
    short = list(short_names(tables[0]["layer"]).values())
    for ax, panel in zip(axes, panels, strict=False):
        apart = differing(tables, panel)[: layout.spikes]
        heights = [float(np.nanmax([t[panel.name].iloc[i] for t in tables])) for i in apart]
        label_points(ax, apart, heights, [short[i] for i in apart], panel.is_log, layout.font - 2)
    return figure


def _shared(first: Side, second: Side) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables with the layers that stand in both, in the order of the first."""
    names = [name for name in first.table["layer"] if name in set(second.table["layer"])]
    if not names:
        raise RunError(
            f"{first.name} and {second.name} have no layer of the same name, so there is nothing to put side "
            "by side. Pass two runs of one model to --against."
        )
    one, other = (side.table.set_index("layer").loc[names].reset_index() for side in (first, second))
    return one, other


def _draw(ax: Axes, tables: tuple[pd.DataFrame, pd.DataFrame], panel: Column, layout: Layout) -> None:
    values = [_values(table, panel) for table in tables]
    x = np.arange(len(values[0]))
    both = np.isfinite(values[0]) & np.isfinite(values[1])
    set_scale(ax, np.concatenate([v[np.isfinite(v)] for v in values]), panel, layout)
    stems(ax, x[both], values[0][both], values[1][both], lw=0.8)
    size = layout.marker(len(x))
    for i, (table, found, style) in enumerate(zip(tables, values, STYLES, strict=True)):
        drawn = np.isfinite(found)
        if panel.error_name in table:
            spread = np.nan_to_num(table[panel.error_name].to_numpy(float))
            bars: dict[str, Any] = {"fmt": "none", "ecolor": style["color"], "elinewidth": 0.7, "alpha": 0.6}
            ax.errorbar(x[drawn], found[drawn], spread[drawn], zorder=2, **bars)
        gid = f"{panel.name}:run{i + 1}"
        ax.plot(x[drawn], found[drawn], ls="", ms=3.6 * size, mew=0.7 * size, zorder=3, gid=gid, **style)


def _values(table: pd.DataFrame, panel: Column) -> np.ndarray:
    """The measure of a panel, NaN where it cannot be drawn on its scale."""
    values = table[panel.name].to_numpy(float)
    return np.where(np.isfinite(values) & ((values > 0) | (not panel.is_log)), values, np.nan)


def differing(tables: tuple[pd.DataFrame, pd.DataFrame], panel: Column) -> list[int]:
    """Indices of the layers whose two values lie further apart than is usual, the furthest first.

    Apart: the ratio on a logarithmic scale, the difference on a linear one; unusual: above Tukey's fence.
    """
    one, other = (_values(table, panel) for table in tables)
    if panel.is_log:
        one, other = np.log(one), np.log(other)
    gap = np.abs(one - other)
    if not np.isfinite(gap).any():
        return []
    far = np.flatnonzero(np.nan_to_num(gap, nan=-np.inf) > max(upper_fence(gap), 0.0))
    return [int(i) for i in far[np.argsort(-gap[far], kind="stable")]]
