"""The frontier plot: KL over the size of the model, with the lists that were compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qprobe.manifest.records import NEAREST, NOTHING, Compared
from qprobe.report.names import plain
from qprobe.report.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, list_name
from qprobe.runs.key import ANSWERS, DAMAGE, DamageWords

_DECADES = 20.0  # KL that spans more than this factor is drawn on a logarithmic scale


def frontier_plot(
    frontier: pd.DataFrame,
    title: str,
    compared: Sequence[Compared] = (),
    damage: DamageWords = DAMAGE[ANSWERS],
) -> Figure:
    """Predicted and measured damage over the size of the model, one colour per way of selecting.

    frontier: columns budget_bytes, predicted_kl, measured_kl, measured_kl_se, candidate. Where every row is a
    candidate of its own, all of them are points of one line. compared: the lists that the run's own was
    chosen among, standard 4-bit and published ones included, each a point with its name. damage: what it is.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    lists = [x for x in compared if x.kl is not None]
    largest = max([float(frontier["budget_bytes"].max()), *(x.total_bytes for x in lists)])
    unit, divisor = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    measured = [*frontier["measured_kl"].dropna(), *(x.kl for x in lists if x.kl is not None)]
    log = bool(measured) and min(measured) > 0 and max(measured) > _DECADES * min(measured)
    if log:
        ax.set_yscale("log", nonpositive="clip")
    sized = frontier.assign(size=frontier["budget_bytes"] / divisor).sort_values("size")
    if frontier["candidate"].is_unique:
        _draw_line(ax, sized, "", 0, log)
    else:
        for i, candidate in enumerate(dict.fromkeys(frontier["candidate"])):
            _draw_line(ax, sized[sized["candidate"] == candidate], f"{candidate}, ", i, log)
    _draw_lists(ax, lists, divisor)
    if log:  # an error bar that reaches 0 must not stretch the axis
        ax.set_ylim(bottom=min(measured) / 3)
    else:
        ax.axhline(0, color="black", lw=0.6)
    ax.set_xlabel(f"size of the model ({unit})")
    ax.set_ylabel(f"{damage.name} to the 16-bit model ({damage.unit})")
    ax.grid(alpha=0.3)
    handles, labels = ax.get_legend_handles_labels()
    lines = [i for i, label in enumerate(labels) if "predicted" in label]  # behind what was measured
    order = [*(i for i in range(len(labels)) if i not in lines), *lines]
    ax.legend([handles[i] for i in order], [labels[i] for i in order], fontsize=8, frameon=False)
    ax.set_title(plain(title), loc="left")
    return figure


def _draw_line(ax: Axes, points: pd.DataFrame, name: str, place: int, log: bool) -> None:
    """The measured points with their standard errors, and the predicted ones dashed."""
    colour = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)[place % 6]
    marker = "os^Dv*"[place % 6]
    if points["measured_kl"].notna().any():
        error = np.nan_to_num(points["measured_kl_se"].to_numpy(float))
        size, kl = points["size"], points["measured_kl"]
        label = f"{name}measured (bars: standard error)"
        ax.errorbar(size, kl, error, color=colour, marker=marker, ms=5, capsize=2, label=label)
    predicted = points[points["predicted_kl"].notna()]
    shown = predicted[predicted["predicted_kl"] > 0] if log else predicted
    hidden = len(predicted) - len(shown)
    if len(predicted):
        note = f" ({hidden} at or below 0 not drawn)" if hidden else ""
        ax.plot(
            shown["size"],
            shown["predicted_kl"],
            color=colour,
            ls="--",
            lw=1,
            marker="x",
            ms=4,
            label=f"{name}predicted{note}",
        )


def _draw_lists(ax: Axes, lists: Sequence[Compared], divisor: int) -> None:
    """Each list as a point with its standard error; the chosen one as a star."""
    names = _names(lists)
    for i, (one, name) in enumerate(zip(lists, names, strict=True)):
        keeps_nothing = one.name in (NOTHING, NEAREST)
        marker, colour = "sD^v"[i // 3 % 4], (GREEN, PURPLE, ORANGE)[i % 3]  # no two of twelve look alike
        style = {
            "marker": "s" if keeps_nothing else marker,
            "ms": 6,
            "color": GREY if keeps_nothing else colour,
        }
        if one.name == NEAREST:
            style["mfc"] = "none"
        if one.chosen:
            style = {"marker": "*", "ms": 15, "color": VERMILION, "mec": "black", "mew": 0.6}
            name = f"{name} (chosen)"
        kl = np.nan if one.kl is None else one.kl
        gid = "chosen" if one.chosen else "list"
        size = one.total_bytes / divisor
        ax.errorbar(
            size, kl, one.kl_se or 0.0, ls="", capsize=2, zorder=3, label=plain(name), gid=gid, **style
        )


def _names(lists: Sequence[Compared]) -> list[str]:
    """What the lists are called; of calibrated weights, standard 4-bit is the one rounded to nearest."""
    is_calibrated = any(x.name == NEAREST for x in lists)
    known = {NOTHING: "calibrated 4-bit" if is_calibrated else "standard 4-bit", NEAREST: "standard 4-bit"}
    return [known.get(x.name) or list_name(x.name) for x in lists]
