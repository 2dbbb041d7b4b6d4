"""The error-spike plot and the frontier of budgets, as matplotlib figures without pyplot.

spike_plot: one panel for each measure that was taken, layers in execution order on x, towers as bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from qprobe.report.labels import label_points
from qprobe.report.names import short_names

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
MOST_NAMED_TICKS = 90  # more names than this cannot be read below the axis
LABELLED_SPIKES = 6  # a panel
LEAST_HEIGHT = 0.05  # of the tallest spike of a linear panel; below, a point lies on the axis


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


def spike_plot(table: pd.DataFrame, kept: frozenset[str], title: str) -> Figure:
    """The error-spike plot of a layer table.

    table: the columns of layers.csv, one row a layer, in execution order. kept: layers in 16-bit.
    A measure without any value gets no panel and is named below the plot.
    """
    measured = [p for p in PANELS if p.column in table and table[p.column].notna().any()]
    missing = [p.what for p in PANELS if p not in measured]
    width = float(np.clip(0.17 * len(table), 10, 17))
    named = len(table) <= MOST_NAMED_TICKS
    figure = Figure(
        figsize=(width, 1.3 + 2.0 * max(len(measured), 1) + (1.6 if named else 0.3)), layout="constrained"
    )
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    axes = figure.subplots(max(len(measured), 1), 1, sharex=True, squeeze=False)[:, 0]
    short = list(short_names(table["layer"]).values())
    for ax, panel in zip(axes, measured, strict=False):
        _draw_panel(ax, table, kept, panel)
    for ax in axes:
        _draw_bands(ax, list(table["tower"]))
    if not measured:
        axes[0].text(0.5, 0.5, "nothing was measured", transform=axes[0].transAxes, ha="center")
    _name_layers(axes[-1], short if named else None)
    _name_towers(axes[0], list(table["tower"]))
    _draw_legend(figure, table, kept, missing)
    figure.draw_without_rendering()  # labels are placed by their size on the finished layout
    for ax, panel in zip(axes, measured, strict=False):
        label_points(ax, *_spikes(table, panel, short), log=panel.log)
    return figure


def _draw_panel(ax: Axes, table: pd.DataFrame, kept: frozenset[str], panel: Panel) -> None:
    values = table[panel.column].to_numpy(float)
    x = np.arange(len(values))
    drawn = np.isfinite(values) & ((values > 0) | (not panel.log))
    is_kept = table["layer"].isin(kept).to_numpy()
    if panel.log and drawn.any():
        ax.set_yscale("log")
        ax.set_ylim(values[drawn].min() / 1.6, values[drawn].max() * 1.6)
    floor = ax.get_ylim()[0] if panel.log else 0.0
    ax.vlines(x[drawn], floor, values[drawn], color=GREY, lw=0.7, alpha=0.6, zorder=2)
    if panel.error_column in table:
        spread = np.nan_to_num(table[panel.error_column].to_numpy(float))
        ax.errorbar(x[drawn], values[drawn], spread[drawn], fmt="none", ecolor=GREY, elinewidth=0.8, zorder=2)
    for mask, style, gid in (
        (drawn & ~is_kept, {"color": BLUE, "marker": "o", "ms": 3.2}, "quantized"),
        (drawn & is_kept, {"color": VERMILION, "marker": "D", "ms": 5.5, "mec": "black", "mew": 0.5}, "kept"),
    ):
        ax.plot(x[mask], values[mask], ls="", zorder=3, gid=f"{panel.column}:{gid}", **style)
    if not panel.log:
        ax.axhline(0, color="black", lw=0.6, zorder=1)
    ax.set_ylabel(panel.label, fontsize=9)
    ax.tick_params(which="both", labelsize=8)
    ax.grid(axis="y", color="white", lw=0.8, zorder=0.5)
    ax.margins(x=0.01)


def tower_runs(towers: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of neighbours in one tower: (tower, first index, last index)."""
    runs: list[tuple[str, int, int]] = []
    for i, tower in enumerate(towers):
        if runs and runs[-1][0] == tower:
            runs[-1] = (tower, runs[-1][1], i)
        else:
            runs.append((tower, i, i))
    return runs


def _draw_bands(ax: Axes, towers: list[str]) -> None:
    for tower, first, last in tower_runs(towers):
        tint = TOWER_TINTS.get(tower, TOWER_TINTS["other"])
        ax.axvspan(first - 0.5, last + 0.5, color=tint, alpha=0.28, lw=0, zorder=0, gid=f"tower:{tower}")
    ax.set_xlim(-0.5, max(len(towers), 1) - 0.5)


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


def _name_towers(ax: Axes, towers: list[str]) -> None:
    """Each tower's name above its layers; where they are too narrow for it, the legend has it alone."""
    for names, first, last in tower_spans(towers):
        if (last - first + 1) / len(towers) > 0.012 * len(names):
            ax.annotate(
                names.replace("_", "-"),
                ((first + last) / 2, 1.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=9,
                gid="tower-name",
            )


def _name_layers(ax: Axes, names: list[str] | None) -> None:
    ax.set_xlabel("layer, in execution order", fontsize=9)
    if names is not None:
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)


def _draw_legend(figure: Figure, table: pd.DataFrame, kept: frozenset[str], missing: list[str]) -> None:
    total, in_16_bit = len(table), int(table["layer"].isin(kept).sum())
    handles: list[Line2D | Patch] = [
        Line2D([], [], ls="", marker="o", color=BLUE, ms=4, label=f"4-bit ({total - in_16_bit} layers)"),
    ]
    if in_16_bit:
        label = f"kept in 16-bit ({in_16_bit} layers)"
        handles.append(Line2D([], [], ls="", marker="D", color=VERMILION, mec="black", mew=0.5, label=label))
    for tower in dict.fromkeys(table["tower"]):
        tint = TOWER_TINTS.get(tower, TOWER_TINTS["other"])
        handles.append(Patch(color=tint, alpha=0.28, lw=0, label=str(tower).replace("_", "-")))
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        title=_facts(table, missing),
        title_fontsize=8,
        alignment="left",
    )


def _facts(table: pd.DataFrame, missing: list[str]) -> str:
    facts = []
    if "samples" in table and table["samples"].notna().any():
        facts.append(f"{int(table['samples'].max())} samples")
    if "activation_nmse" in table and table["activation_nmse"].notna().any():
        idle = int(table["activation_nmse"].isna().sum())
        facts += [f"{idle} of {len(table)} layers have no activation error"] if idle else []
    if missing:
        facts.append(f"not measured: {', '.join(missing)}")
    return "; ".join(facts)


def _spikes(table: pd.DataFrame, panel: Panel, short: list[str]) -> tuple[list[int], list[float], list[str]]:
    """Index, value and short name of the layers that stand out most, the biggest first.

    A spike lies above Tukey's fence: the upper quartile plus 1.5 times the distance of the quartiles,
    taken on the scale that is drawn. On a linear scale it must also be tall enough to be seen.
    """
    values = table[panel.column].to_numpy(float)
    drawn = np.isfinite(values) & (values > 0)
    if not drawn.any():
        return [], [], []
    scaled = np.log(np.where(drawn, values, np.nan)) if panel.log else np.where(drawn, values, np.nan)
    low, high = np.nanquantile(scaled, [0.25, 0.75])
    fence = high + 1.5 * (high - low)
    if not panel.log:
        fence = max(fence, LEAST_HEIGHT * float(values[drawn].max()))
    spikes = np.flatnonzero(drawn & (np.nan_to_num(scaled, nan=-np.inf) > fence))
    chosen = [int(i) for i in spikes[np.argsort(-values[spikes], kind="stable")][:LABELLED_SPIKES]]
    return chosen, [float(values[i]) for i in chosen], [short[i] for i in chosen]


def frontier_plot(frontier: pd.DataFrame, title: str) -> Figure:
    """Predicted and measured KL over the size of the model, one colour a way of choosing.

    frontier: columns budget_bytes, predicted_kl, measured_kl, measured_kl_se, candidate. Where every row is a
    candidate of its own, all of them are points of one line.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    unit, divisor = ("GiB", 2**30) if frontier["budget_bytes"].max() >= 2**30 else ("MiB", 2**20)
    sized = frontier.assign(size=frontier["budget_bytes"] / divisor).sort_values("size")
    if frontier["candidate"].is_unique:
        _draw_frontier(ax, sized, "", 0)
    else:
        for i, candidate in enumerate(dict.fromkeys(frontier["candidate"])):
            _draw_frontier(ax, sized[sized["candidate"] == candidate], f"{candidate}, ", i)
    ax.set_xlabel(f"size of the model ({unit})")
    ax.set_ylabel("KL to the 16-bit model (nats / answer token)")
    ax.axhline(0, color="black", lw=0.6)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False)
    ax.set_title(title, loc="left")
    return figure


def _draw_frontier(ax: Axes, points: pd.DataFrame, name: str, place: int) -> None:
    """The measured points with their standard errors, and the predicted ones dashed."""
    colour = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)[place % 6]
    marker = "os^Dv*"[place % 6]
    if points["measured_kl"].notna().any():
        error = np.nan_to_num(points["measured_kl_se"].to_numpy(float))
        size, kl = points["size"], points["measured_kl"]
        label = f"{name}measured (bars: standard error)"
        ax.errorbar(size, kl, error, color=colour, marker=marker, ms=5, capsize=2, label=label)
    if points["predicted_kl"].notna().any():
        label = f"{name}predicted"
        ax.plot(points["size"], points["predicted_kl"], color=colour, ls="--", lw=1, label=label)
