"""The report of the stability study: tables in stability.md, and the loss curves as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COLOURS = {  # by base, in the order of the table
    "16-bit": "#444444",
    "nf4": "#d55e00",
    "dynamic": "#0072b2",
    "calibrated": "#009e73",
    "corrected": "#cc79a7",
}
TAIL = 50  # steps at the end in which a run should have come to rest
WINDOW = 10  # steps that one point of the picture averages
Rows = list[dict[str, Any]]


def write_report(outcomes: Rows, out: Path) -> None:
    """stability.md and losses.png in `out`, from the outcomes of `stability`; nothing in them is made up."""
    out.mkdir(parents=True, exist_ok=True)
    models = list(dict.fromkeys(x["model"] for x in outcomes))
    draw(outcomes, models, out / "losses.png")
    (out / "stability.md").write_text(_text(outcomes, models), "utf-8")


def spread(values: Sequence[float]) -> str:
    """Mean and range of the seeds' values."""
    mean = statistics.fmean(values)
    return f"{mean:.4g}" if len(values) == 1 else f"{mean:.4g} ({min(values):.4g} to {max(values):.4g})"


def off_16bit(one: dict[str, Any], reference: dict[str, Any], last: int | None = None) -> float:
    """Root mean square, over the `last` steps or all, of the difference of the losses of the same batch."""
    pairs = list(zip(one["losses"], reference["losses"], strict=True))[-last if last else None :]
    return math.sqrt(statistics.fmean((a[1] - b[1]) ** 2 for a, b in pairs))


def unrest(one: dict[str, Any]) -> float:
    """Standard deviation of the loss over the last steps, relative to its mean there."""
    tail = [loss for _, loss in one["losses"][-TAIL:]]
    return statistics.pstdev(tail) / statistics.fmean(tail)


def _text(outcomes: Rows, models: Sequence[str]) -> str:
    seeds = sorted({x["seed"] for x in outcomes})
    steps = sorted({x["steps"] for x in outcomes})
    made_with = "; ".join(sorted({x["made_with"] for x in outcomes}))
    head = (
        "# Stability study: all figures\n\n"
        "`python -m tests.benchmarks.stability` (what it does stands in that file). "
        f"Seeds {', '.join(map(str, seeds))}; {', '.join(map(str, steps))} steps of 4 lines, rank 16, "
        f"learning rate 2e-4. {made_with}.\n\n"
        "Figures are means over the seeds, with the range where there are several. *Unrest* is the standard "
        f"deviation of the loss over the last {TAIL} steps, relative to its mean there. *Off 16-bit* is the "
        "root mean square, over the steps, of the difference to the loss of the 16-bit base on the same "
        "batch. *Facts right* are shares of what held-out scenes show, of the new kind that is trained on "
        "and of the old kinds that may be forgotten.\n\n"
        "![Loss by step](losses.png)\n"
    )
    return head + "".join(f"\n## {model}\n\n{_table(outcomes, model)}\n" for model in models)


def _table(outcomes: Rows, model: str) -> str:
    mine = [x for x in outcomes if x["model"] == model]
    reference = {x["seed"]: x for x in mine if x["base"] == "16-bit"}
    columns: dict[str, Callable[[dict[str, Any]], float]] = {
        "held-out loss before": lambda x: x["eval_loss_before"],
        "held-out loss after": lambda x: x["eval_loss"],
        "unrest": unrest,
        "new kind, facts right before": lambda x: x["new_before"],
        "new kind, after": lambda x: x["new_after"],
        "old kinds, before": lambda x: x["old_before"],
        "old kinds, after": lambda x: x["old_after"],
    }
    lines = [
        f"| base | seeds | {' | '.join(columns)} | off 16-bit | off 16-bit, last {TAIL} steps |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for base in COLOURS:
        rows = [x for x in mine if x["base"] == base]
        if not rows:
            continue
        pairs = [(x, reference[x["seed"]]) for x in rows if x["seed"] in reference]
        cells = [spread([value(x) for x in rows]) for value in columns.values()]
        for last in (None, TAIL):
            cells.append(spread([off_16bit(*pair, last) for pair in pairs]) if pairs else "-")
        lines.append(f"| {base} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(outcomes: Rows, models: Sequence[str], path: Path) -> None:
    """The mean loss of the seeds by step, averaged over WINDOW steps, with the range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for base in COLOURS:
            curves = [_smooth(x["losses"]) for x in outcomes if x["model"] == model and x["base"] == base]
            if not curves:
                continue
            steps = [step for step, _ in curves[0]]
            values = list(zip(*([loss for _, loss in c] for c in curves), strict=True))
            label = f"{base} ({len(curves)} seed{'s' if len(curves) > 1 else ''})"
            axis.plot(steps, [statistics.fmean(v) for v in values], color=COLOURS[base], label=label)
            axis.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=COLOURS[base], alpha=0.2
            )
        axis.set(title=model, xlabel="step", ylabel="loss, nats per answer token", yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smooth(losses: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """(last step, mean loss) of every WINDOW steps."""
    return [
        (losses[min(i + WINDOW, len(losses)) - 1][0], statistics.fmean(x[1] for x in losses[i : i + WINDOW]))
        for i in range(0, len(losses), WINDOW)
    ]
