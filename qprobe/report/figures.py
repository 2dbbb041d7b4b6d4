"""The error-spike plot, and the same for two runs, as matplotlib figures without pyplot.

One panel for each measure that was taken, layers in execution order on x, towers as bands.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatterSciNotation, LogLocator

from qprobe.registry.measures import ACTIVATION, Column
from qprobe.report.labels import label_points
from qprobe.report.names import plain, short_names
from qprobe.report.panels import (
    BLUE,
    GREY,
    TOWER_TINTS,
    VERMILION,
    figure_label,
    panel_columns,
    spike_indices,
    taken,
    tower_runs,
    tower_spans,
)

_CHARACTER = 0.55  # width of a character on average, in sizes of its font
# Of the three sorts of layers, the sizes as on a page.
_QUANTIZED: dict[str, Any] = {"color": BLUE, "marker": "o", "ms": 3.2}
_KEPT: dict[str, Any] = {"color": VERMILION, "marker": "D", "ms": 5.5, "mec": "black", "mew": 0.5}
_ALWAYS: dict[str, Any] = {"color": "white", "marker": "D", "ms": 5.0, "mec": "black", "mew": 0.8}
UNITS = (
    "nmse: squared error / squared signal; D: 4-bit weight \N{MINUS SIGN} 16-bit weight; bars: standard error"
)


@dataclass(frozen=True)
class Layout:
    """Sizes of a figure, in inches and points.

    least_width, most_width: between them 0.17 inches a layer. most_named: more layers than this are not named
    below the axis. spikes: how many are named in a panel. dpi: of PNG files. beside: the measure is
    named beside its panel, else above it.
    """

    least_width: float
    most_width: float
    panel_height: float
    font: float
    most_named: int
    spikes: int
    dpi: int
    beside: bool

    def marker(self, layers: int) -> float:
        """How large markers are, 1 on a page; smaller where they would cover their neighbours."""
        points_each = 72 * self.width(layers) / max(layers, 1)
        return self.font / 9 * float(np.clip(points_each / 5, 0.45, 1))

    def width(self, layers: int) -> float:
        return float(np.clip(0.17 * layers, self.least_width, self.most_width))


PAGE = Layout(10, 17, 2.0, 9, 90, 12, 110, True)
COLUMN = Layout(3.35, 3.35, 0.95, 6.5, 0, 3, 300, False)  # a column of a paper: read at its own size


@dataclass(frozen=True)
class Kept:
    """Names of the layers in 16-bit: those that a list keeps, and those that standard 4-bit keeps as well."""

    chosen: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()

    @property
    def in_16bit(self) -> frozenset[str]:
        return self.chosen | self.always


def spike_plot(table: pd.DataFrame, kept: Kept, title: str, layout: Layout = PAGE) -> Figure:
    """The error-spike plot of a layer table.

    table: the columns of layers.csv, one row per layer, in execution order. kept: layers in 16-bit.
    A measure without any value gets no panel and is named below the plot.
    """
    panels = taken([table])
    figure, axes = framed(table, panels, title, layout)
    short = list(short_names(table["layer"]).values())
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, table, kept, panel, layout)
    finished(figure, axes, table, layout, _series_of(table, kept), _facts(table, panels))
    for ax, panel in zip(axes, panels, strict=False):
        spikes = spike_indices(table, panel)[: layout.spikes]
        heights = [float(table[panel.name].iloc[i]) for i in spikes]
        label_points(ax, spikes, heights, [short[i] for i in spikes], panel.is_log, layout.font - 2)
    return figure


def framed(
    table: pd.DataFrame, panels: list[Column], title: str, layout: Layout
) -> tuple[Figure, list[Axes]]:
    """An empty figure with room for the panels, one at least, and their axes from top to bottom."""
    named = 1.6 if len(table) <= layout.most_named else 0.3
    count = max(len(panels), 1)
    height = _around(layout) + layout.panel_height * count + named
    # Names of spikes raise the limits afterwards, and with them the width of the tick labels: hence the pad.
    arranged = ConstrainedLayoutEngine(w_pad=0.04 if layout.beside else 0.08)
    figure = Figure(figsize=(layout.width(len(table)), height), layout=arranged)
    figure.suptitle(plain(title), fontsize=layout.font + min(4, layout.font - 5), x=0.01, ha="left")
    axes = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for ax in axes[:-1]:  # all have the limits of the last; ticks of up to 90 layers in each are slow to draw
        ax.set_xticks([])
    if not panels:
        axes[0].text(0.5, 0.5, "nothing was measured", transform=axes[0].transAxes, ha="center")
    return figure, axes


def _around(layout: Layout) -> float:
    """Inches for the title and the legend, which `finished` adds to where its legend is higher."""
    return 0.145 * layout.font


def finished(
    figure: Figure,
    axes: list[Axes],
    table: pd.DataFrame,
    layout: Layout,
    series: list[Line2D],
    facts: str,
) -> None:
    """Bands, names and legend; afterwards the layout stands, and labels can be placed by their size."""
    towers = list(table["tower"])
    for ax in axes:
        _draw_bands(ax, towers, layout)
    _name_layers(axes[-1], table, layout)
    _name_towers(axes[0], towers, layout)
    patches = [
        Patch(color=_tint(tower), alpha=0.28, lw=0, label=str(tower).replace("_", "-"))
        for tower in dict.fromkeys(towers)
    ]
    handles, width, font = [*series, *patches], layout.width(len(table)), layout.font - 1
    columns = _columns([str(h.get_label()) for h in handles], layout, width)
    title = _wrapped(facts, width, font)
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=columns,
        fontsize=font,
        frameon=False,
        title=title,
        title_fontsize=font,
        alignment="left",
    )
    below = (1.5 * -(-len(handles) // columns) + 1.3 * len(title.splitlines()) + 1.2) * font / 72
    figure.set_figheight(figure.get_figheight() + max(0, below + 0.04 * layout.font - _around(layout)))
    arranged = figure.get_layout_engine()
    assert arranged is not None, "framed gives a layout engine"
    arranged.execute(figure)
    figure.set_layout_engine("none")  # it stands now: drawn again, it would move under the labels


def _columns(labels: list[str], layout: Layout, width: float) -> int:
    """How many columns of the longest of `labels` fit a legend of `width` inches."""
    longest = max(map(len, labels)) * _CHARACTER * (layout.font - 1) + 4.5 * layout.font
    return max(1, min(len(labels), int(72 * width / longest)))


def _wrapped(text: str, width: float, font: float) -> str:
    """`text` in lines that fit `width` inches."""
    characters = int(width * 72 / (_CHARACTER * font))
    return "\n".join(fill(line, characters) for line in text.splitlines())


def _draw_panel(ax: Axes, table: pd.DataFrame, kept: Kept, panel: Column, layout: Layout) -> None:
    values = table[panel.name].to_numpy(float)
    x = np.arange(len(values))
    drawn = np.isfinite(values) & ((values > 0) | (not panel.is_log))
    is_chosen, is_always = (table["layer"].isin(x).to_numpy() for x in (kept.chosen, kept.always))
    set_scale(ax, values[drawn], panel, layout)
    floor = ax.get_ylim()[0] if panel.is_log else 0.0
    thin = 0.7 * layout.marker(len(values)) * 9 / layout.font
    stems(ax, x[drawn], np.full(drawn.sum(), floor), values[drawn], lw=thin, alpha=0.6)
    if panel.error_name in table:
        spread = np.nan_to_num(table[panel.error_name].to_numpy(float))
        ax.errorbar(x[drawn], values[drawn], spread[drawn], fmt="none", ecolor=GREY, elinewidth=0.8, zorder=2)
    size = layout.marker(len(values))
    for mask, style, gid in (
        (drawn & ~is_chosen & ~is_always, _QUANTIZED, "quantized"),
        (drawn & is_always, _ALWAYS, "always"),
        (drawn & is_chosen, _KEPT, "kept"),
    ):
        scaled = {key: style[key] * size for key in ("ms", "mew") if key in style}
        ax.plot(x[mask], values[mask], ls="", zorder=3, gid=f"{panel.name}:{gid}", **{**style, **scaled})


def stems(ax: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, lw: float, alpha: float = 1) -> None:
    """Grey vertical lines at `x` from `low` to `high`, as one path.

    `Axes.vlines` makes an object of each, which takes half of the time of an SVG of 500 layers.
    """
    gaps = np.full(len(x), np.nan)
    across, up = (np.column_stack(ends).ravel() for ends in ((x, x, gaps), (low, high, gaps)))
    style: dict[str, Any] = {"color": GREY, "solid_capstyle": "butt", "snap": True, "zorder": 2}
    ax.plot(across, up, lw=lw, alpha=alpha, gid="stems", **style)


def set_scale(ax: Axes, values: np.ndarray, panel: Column, layout: Layout) -> None:
    """The y axis of one panel, made for the finite `values` that will be drawn."""
    if panel.is_log and len(values):
        low, high = log_limits(float(values.min()), float(values.max()))
        ax.set_yscale("log")
        ax.set_ylim(low, high)
        # Between powers of ten, labels only where a single one is in view: all at once cannot be read.
        ax.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1, 0.4)))
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if high / low < 250 else "auto"))
    if not panel.is_log:
        ax.axhline(0, color="black", lw=0.6, zorder=1)
    if layout.beside:
        ax.set_ylabel(figure_label(panel), fontsize=layout.font)
    else:
        ax.set_title(f"{panel.label} ({panel.unit})", fontsize=layout.font, loc="left", pad=2)
    ax.tick_params(which="both", labelsize=layout.font - 1)
    ax.grid(axis="y", color="white", lw=0.8, zorder=0.5)
    ax.margins(x=0.01)


def log_limits(low: float, high: float) -> tuple[float, float]:
    """Limits of a logarithmic axis around values, a decade at least, so that it has two labels to read."""
    middle, half = (low * high) ** 0.5, max(1.6 * (high / low) ** 0.5, 10**0.5)
    return middle / half, middle * half


def _tint(tower: str) -> str:
    return TOWER_TINTS.get(tower, TOWER_TINTS["other"])


def _draw_bands(ax: Axes, towers: list[str], layout: Layout) -> None:
    for tower, first, last in tower_runs(towers):
        ax.axvspan(
            first - 0.5, last + 0.5, color=_tint(tower), alpha=0.28, lw=0, zorder=0, gid=f"tower:{tower}"
        )
    count = max(len(towers), 1)
    points_each = 65 * layout.width(count) / count  # a little of the 72 is the axis' own
    margin = max(0.5, 5 * layout.marker(count) / points_each)  # or the edge would halve the last mark
    ax.set_xlim(-margin, count - 1 + margin)


def _name_towers(ax: Axes, towers: list[str], layout: Layout) -> None:
    """Each tower's name above its layers; where they are too narrow for it, the legend has it alone."""
    share = 0.0083 * layout.font / layout.width(len(towers))  # of the width, for a character
    for names, first, last in tower_spans(towers):
        if (last - first + 1) / len(towers) > share * len(names):
            ax.annotate(
                names.replace("_", "-"),
                ((first + last) / 2, 1.02 if layout.beside else 1.18),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=layout.font,
                gid="tower-name",
            )


def _name_layers(ax: Axes, table: pd.DataFrame, layout: Layout) -> None:
    ax.set_xlabel("layer, in execution order", fontsize=layout.font)
    if len(table) <= layout.most_named:
        names = list(short_names(table["layer"]).values())
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=layout.font - 2.5)
        return
    step = next(x for x in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if 8 * x >= len(table) or x == 1000)
    counted = [1, *range(step, len(table) + 1, step)] if step > 1 else list(range(1, len(table) + 1))
    ax.set_xticks([number - 1 for number in counted], [str(number) for number in counted])


def _series_of(table: pd.DataFrame, kept: Kept) -> list[Line2D]:
    """The legend's lines; as in the verdict, what standard 4-bit keeps as well is named and not counted."""
    chosen = int(table["layer"].isin(kept.chosen - kept.always).sum())
    always = [name for name in table["layer"] if name in kept.always]
    lines = [(f"4-bit ({_layers(len(table) - chosen - len(always))})", _QUANTIZED)]
    lines += [(f"kept in 16-bit ({_layers(chosen)})", _KEPT)] if chosen else []
    if always:
        short = short_names(table["layer"])
        named = short[always[0]] if len(always) == 1 else _layers(len(always))
        lines.append((f"in 16-bit in standard 4-bit too ({named})", _ALWAYS))
    return [Line2D([], [], ls="", label=plain(label), **style) for label, style in lines]


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _facts(table: pd.DataFrame, panels: list[Column]) -> str:
    facts = [*samples_of(table)]
    if ACTIVATION.score in table and table[ACTIVATION.score].notna().any():
        idle = int(table[ACTIVATION.score].isna().sum())
        facts += [f"{idle} of {len(table)} layers have no activation error"] if idle else []
    return with_missing("; ".join(facts), panels)


def samples_of(table: pd.DataFrame) -> list[str]:
    """How many samples the table rests on, in words; nothing where that is unknown."""
    if "samples" in table and table["samples"].notna().any():
        return [f"{int(table['samples'].max())} samples"]
    return []


def with_missing(facts: str, panels: list[Column]) -> str:
    """`facts`, the measures that have no panel, and on a line of its own what the units mean."""
    missing = [p.label for p in panel_columns() if p not in panels]
    said = [facts] if facts else []
    said += [f"not measured: {', '.join(missing)}"] if missing else []
    return "\n".join(filter(None, ["; ".join(said), UNITS if panels else ""]))
