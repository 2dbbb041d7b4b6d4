"""The tables of `tests.benchmarks.starts`: KL before the first step, and losses with paired errors."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from math import fsum, sqrt
from typing import Any

from qprobe.runs.statistics import ratio_se

MARKS = {"corrected": 0.85, "distilled": 0.65}  # of the zero start's KL, on the calibrated, untuned base


def report(found: Sequence[Mapping[str, Any]], command: str) -> str:
    """Markdown of all bases that were measured."""
    made_with = "; ".join(sorted({x["made_with"] for x in found}))
    parts = [
        "# Where an adapter begins\n",
        f"`{command}` (what it does stands in that file). {made_with}.\n",
        "Shares are of the KL of the zero start, which is that of the base alone; their errors are of the "
        "paired difference over samples. Losses are means over lines and seeds, in nats per answer token; "
        "behind each the difference to the zero start with its standard error, paired by line, averaged over "
        "seeds.",
    ]
    for model in sorted({x["model"] for x in found}):
        mine = [x for x in found if x["model"] == model]
        parts.append(f"\n## {model}\n\n{kl_table(mine)}\n\n{loss_table(mine)}\n\n{marks(mine)}")
    return "\n".join(parts) + "\n"


def share(kl: Mapping[str, Sequence[float]], start: str) -> tuple[float, float]:
    """(KL of a start over that of the zero start, its standard error over samples)."""
    return fsum(kl[start]) / fsum(kl["zero"]), ratio_se(kl[start], kl["zero"])


def kl_table(found: Sequence[Mapping[str, Any]]) -> str:
    """KL of the zero start, and every other start's share of it."""
    starts = list(found[0]["kl"])
    lines = [
        f"| base | zero start's KL | {' | '.join(starts[1:])} | distilled: steps, KL on what is kept back |",
        "|---" * (len(starts) + 2) + "|",
    ]
    for x in found:
        tokens = sum(x["tokens"])
        zero = f"{fsum(x['kl']['zero']) / tokens:.4g} ± {ratio_se(x['kl']['zero'], x['tokens']):.2g}"
        cells = ["{:.3f} ± {:.2g}".format(*share(x["kl"], start)) for start in starts[1:]]
        step, before, after = x["distilled"]
        lines.append(f"| {x['base']} | {zero} | {' | '.join(cells)} | {step}: {before:.4g} to {after:.4g} |")
    return "\n".join(lines)


def paired(curves: Sequence[Any], zeros: Sequence[Any], look: int) -> tuple[float, float]:
    """(difference of losses, its standard error over lines) at one look, averaged over seeds."""
    by_seed = [
        [a - b for a, b in zip(mine[look][1], zero[look][1], strict=True)]
        for mine, zero in zip(curves, zeros, strict=True)
    ]
    lines = [statistics.fmean(x) for x in zip(*by_seed, strict=True)]
    error = statistics.stdev(lines) / sqrt(len(lines)) if len(lines) > 1 else float("nan")
    return statistics.fmean(lines), error


def loss_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Held-out losses at each look, with the spread of the seeds at the last one."""
    looks = [step for step, _ in found[0]["losses"]["zero"][0]]
    titles = [f"after {x} steps" if x else "before the first step" for x in looks]
    lines = [f"| base | start | {' | '.join(titles)} | seeds, last |", "|---" * (len(looks) + 3) + "|"]
    for x in found:
        zeros = x["losses"]["zero"]
        for start, curves in x["losses"].items():
            cells = []
            for look in range(len(looks)):
                mean = statistics.fmean(statistics.fmean(one[look][1]) for one in curves)
                difference = (
                    "" if start == "zero" else " ({:+.4f} ± {:.2g})".format(*paired(curves, zeros, look))
                )
                cells.append(f"{mean:.4f}{difference}")
            last = [statistics.fmean(one[-1][1]) for one in curves]
            lines.append(
                f"| {x['base']} | {start} | {' | '.join(cells)} | {min(last):.4f} to {max(last):.4f} |"
            )
    return "\n".join(lines)


def marks(found: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for each mark on the calibrated, untuned base, and one on starts that end worse."""
    said = []
    for x in (x for x in found if x["base"] == "calibrated"):
        for start, most in MARKS.items():
            value, error = share(x["kl"], start)
            kept = "kept" if value <= most else "missed"
            said.append(
                f"Mark of {start} on the calibrated base, at most {most}: {value:.3f} ± {error:.2g}, {kept}."
            )
    worse = []
    for x in found:
        for start in ("corrected", "distilled"):
            difference, error = paired(x["losses"][start], x["losses"]["zero"], -1)
            if difference > 2 * error:
                worse.append(f"{start} on {x['base']} ({difference:+.4f} ± {error:.2g})")
    said.append(f"Ended worse than zero by more than two errors: {', '.join(worse) or 'none'}.")
    return " ".join(said)
