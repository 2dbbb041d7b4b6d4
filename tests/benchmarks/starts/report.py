"""The tables of `tests.benchmarks.starts`: KL before the first step, and losses with paired errors."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import fsum, sqrt
from pathlib import Path
from typing import Any

from qprobe.runs.statistics import ratio_se
from qprobe.system.files import write_atomic

MARKS = {"corrected": 0.85, "distilled": 0.65}  # of the zero start's KL, on the calibrated, untuned base


def keep(folder: Path, command: str, found: Any) -> None:
    """Writes what is known of one base, and the report of all bases of which something is."""
    parts = folder / "bases"
    parts.mkdir(parents=True, exist_ok=True)
    write_atomic(parts / f"{found.model}-{found.base}.json", json.dumps(asdict(found)).encode())
    there = [json.loads(x.read_text()) for x in sorted(parts.iterdir()) if x.suffix == ".json"]
    write_atomic(folder / "starts.md", report(there, command).encode())


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
    found = [x for x in found if "zero" in x["kl"]]
    if not found:
        return "No KL yet."
    starts = max((list(x["kl"]) for x in found), key=len)
    lines = [
        f"| base | zero start's KL | {' | '.join(starts[1:])} | distilled: steps, KL on what is kept back |",
        "|---" * (len(starts) + 2) + "|",
    ]
    for x in found:
        tokens = sum(x["tokens"])
        zero = f"{fsum(x['kl']['zero']) / tokens:.4g} ± {ratio_se(x['kl']['zero'], x['tokens']):.2g}"
        cells = [
            "{:.3f} ± {:.2g}".format(*share(x["kl"], start)) if start in x["kl"] else ""
            for start in starts[1:]
        ]
        taught = "{}: {:.4g} to {:.4g}".format(*x["distilled"]) if x["distilled"] else ""
        lines.append(f"| {x['base']} | {zero} | {' | '.join(cells)} | {taught} |")
    return "\n".join(lines)


def paired(curves: Sequence[Any], zeros: Sequence[Any], look: int) -> tuple[float, float]:
    """(difference of losses, its standard error over lines) at one look, averaged over seeds that have it."""
    by_seed = [
        [a - b for a, b in zip(mine[look][1], zero[look][1], strict=True)]
        for mine, zero in zip(curves, zeros, strict=True)
        if look < min(len(mine), len(zero))
    ]
    lines = [statistics.fmean(x) for x in zip(*by_seed, strict=True)]
    error = statistics.stdev(lines) / sqrt(len(lines)) if len(lines) > 1 else float("nan")
    return statistics.fmean(lines), error


def loss_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Held-out losses at each look, with the spread of the seeds at the last one that was reached."""
    found = [x for x in found if x["losses"]]
    if not found:
        return "No losses yet."
    looks = max(([step for step, _ in x["losses"]["zero"][0]] for x in found), key=len)
    titles = [f"after {x} steps" if x else "before the first step" for x in looks]
    lines = [
        f"| base | start | {' | '.join(titles)} | seeds, last | seeds |",
        "|---" * (len(looks) + 4) + "|",
    ]
    for x in found:
        for start, curves in x["losses"].items():
            cells = [_cell(curves, x["losses"]["zero"], look, start) for look in range(len(looks))]
            most = max(map(len, curves))
            last = [statistics.fmean(one[-1][1]) for one in curves if len(one) == most]
            lines.append(
                f"| {x['base']} | {start} | {' | '.join(cells)} | {min(last):.4f} to {max(last):.4f} | "
                f"{len(last)} of {len(curves)} |"
            )
    return "\n".join(lines)


def _cell(curves: Sequence[Any], zeros: Sequence[Any], look: int, start: str) -> str:
    """The mean loss at `look` of the seeds that have it, and its difference to the zero start."""
    there = [statistics.fmean(one[look][1]) for one in curves if look < len(one)]
    if not there:
        return ""
    mean = f"{statistics.fmean(there):.4f}"
    return mean if start == "zero" else "{} ({:+.4f} ± {:.2g})".format(mean, *paired(curves, zeros, look))


def marks(found: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for each mark on the calibrated, untuned base, and one on starts that end worse."""
    said = []
    for x in (x for x in found if x["base"] == "calibrated"):
        for start, most in MARKS.items():
            if start in x["kl"]:
                value, error = share(x["kl"], start)
                kept = "kept" if value <= most else "missed"
                said.append(
                    f"Mark of {start} on the calibrated base, at most {most}: {value:.3f} ± {error:.2g}, "
                    f"{kept}."
                )
    worse, ended = [], [x for x in found if x["losses"]]
    for x in ended:
        for start in (s for s in x["losses"] if s not in ("zero", "loftq")):
            last = max(map(len, x["losses"][start])) - 1
            difference, error = paired(x["losses"][start], x["losses"]["zero"], last)
            if difference > 2 * error:
                worse.append(f"{start} on {x['base']} ({difference:+.4f} ± {error:.2g})")
    if ended:
        said.append(f"Ended worse than zero by more than two errors: {', '.join(worse) or 'none'}.")
    return " ".join(said)
