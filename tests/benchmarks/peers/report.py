"""The table and the figure of what was measured.

    python -m tests.benchmarks.peers.report DIR... --out reports/peers [--remark NAME=TEXT ...]

writes them from what several commands left in DIR..., side by side or on several machines; they must have
judged the same passages (`--passages`). A remark stands in the row of the format NAME.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qprobe.runs.statistics import ratio_se
from tests.benchmarks.peers.passages import OWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Row = Mapping[str, Any]
PLAIN, OURS = "nf4", "nf4-calibrated"


COMMAND = "python -m tests.benchmarks.peers"


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of `parts` found; a later one's row replaces an earlier one's of the same name."""
    tokens = parts[0]["tokens"]
    if any(part["tokens"] != tokens for part in parts):
        raise SystemExit("Not all of these were judged on the same passages.")
    rows = {row["name"]: row for part in parts for row in part["rows"]}
    missing = {name: why for part in parts for name, why in part["missing"].items() if name not in rows}
    machines = dict.fromkeys(part["machine"] for part in parts)
    return {
        "model": parts[0]["model"],
        "tokens": tokens,
        "rows": list(rows.values()),
        "missing": missing,
        "machine": "; ".join(machines),
        "remarks": {name: text for part in parts for name, text in part.get("remarks", {}).items()},
    }


def write(found: Mapping[str, Any], out: Path) -> str:
    """Writes peers.json, and the table and the figure once plain NF4 is known; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "peers.json").write_text(json.dumps(found))
    if all(x["name"] != PLAIN for x in found["rows"]):
        return f"Without {PLAIN} there is no table yet."
    text = f"{heading(found)}\n{table(found)}\n"
    (out / "peers.md").write_text(text)
    figure(found, out / "peers.png")
    return text


def share(row: Row, other: Row, kind: str = OWN) -> tuple[float, float]:
    """(KL of `row` as a share of `other`'s, its standard error over the same passages)."""
    found, whole = row["kl"][kind], other["kl"][kind]
    return fsum(found) / fsum(whole), ratio_se(found, whole)


def is_ours(name: str) -> bool:
    """True for our own formats."""
    return name.startswith(PLAIN)


def best_of_ours(row: Row, rows: Sequence[Row]) -> Row | None:
    """The best of our calibrated ones at the same or fewer bits; None if all take more."""
    mine = [x for x in rows if x["name"].startswith(OURS) and x["bits"] <= row["bits"]]
    return min(mine, key=lambda x: fsum(x["kl"][OWN]), default=None)


def beside_ours(row: Row, rows: Sequence[Row]) -> str:
    """Whether ours leaves less at the same or fewer bits, by the paired difference."""
    if is_ours(row["name"]) or not any(x["name"].startswith(OURS) for x in rows):
        return ""
    mine = best_of_ours(row, rows)
    if mine is None:
        return "none of ours is as small"
    ratio, error = share(mine, row)
    said = "ours leaves" if ratio < 1 else "**the peer is better**: ours leaves"
    sure = "" if abs(ratio - 1) > 2 * error else ", within two errors"
    worse = [kind for kind in row["kl"] if kind != OWN and is_more(mine, row, kind)]
    elsewhere = f"; **the peer is better** on {', '.join(worse)}" if worse else ""
    return f"{said} {ratio:.2f} ± {error:.2f} of it at {mine['bits']:.2f} bits{sure}{elsewhere}"


def is_more(row: Row, other: Row, kind: str) -> bool:
    """True if `row` leaves more than `other` on this kind of sample, by more than two paired errors."""
    ratio, error = share(row, other, kind)
    return ratio - 1 > 2 * error


def table(found: Mapping[str, Any]) -> str:
    """Markdown: one row per format, by bits."""
    rows = sorted(found["rows"], key=lambda x: (round(x["bits"], 2), fsum(x["kl"][OWN])))
    plain = next(x for x in rows if x["name"] == PLAIN)
    kinds, remarks = list(plain["kl"]), found.get("remarks", {})
    titles = ["format", "bits per weight", "MiB", *kinds, "seconds", "peak GiB", "beside ours"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        shares = [share(row, plain, kind) for kind in kinds]
        cells = [
            f"**{row['name']}**" if is_ours(row["name"]) else row["name"],
            f"{row['bits']:.3f}",
            f"{row['total_bytes'] / 2**20:.1f}",
            *(f"{x:.3f} ± {se:.3f}" for x, se in shares),
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 2**30:.1f}",
            "; ".join(x for x in (beside_ours(row, rows), remarks.get(row["name"])) if x),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(found: Mapping[str, Any]) -> str:
    """What was measured, with which command, where, and what was not run."""
    plain = next(x for x in found["rows"] if x["name"] == PLAIN)
    tokens = found["tokens"]
    kl = {kind: fsum(sums) / sum(tokens[kind]) for kind, sums in plain["kl"].items()}
    errors = {kind: ratio_se(sums, tokens[kind]) for kind, sums in plain["kl"].items()}
    counts = ", ".join(
        f"{kind} {len(x)} samples, KL of plain NF4 {kl[kind]:.4f} ± {errors[kind]:.4f}"
        for kind, x in tokens.items()
    )
    missing = [f"- not run: {name}: {why}" for name, why in found["missing"].items()]
    return "\n".join([f"    {COMMAND}\n", f"{found['model']}. {found['machine']}. {counts}.\n", *missing, ""])


def figure(found: Mapping[str, Any], path: Path) -> None:
    """KL over bits per weight of every format, as a share of plain NF4's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plain = next(x for x in found["rows"] if x["name"] == PLAIN)
    fig, ax = plt.subplots(figsize=(9, 5.5), layout="constrained")
    lines: dict[str, list[tuple[float, float, float]]] = {}
    names: list[tuple[str, float, float]] = []
    for row in found["rows"]:
        point = (row["bits"], *share(row, plain))
        if is_ours(row["name"]):
            lines.setdefault(row["name"].partition(" with list")[0], []).append(point)
        else:
            ax.errorbar(point[0], point[1], 2 * point[2], fmt="o", color="tab:gray", capsize=2)
            names.append((row["name"], point[0], point[1]))
    for name, points in lines.items():
        bits, shares, errors = zip(*sorted(points), strict=True)
        label = f"qprobe: {name}{', with list' if len(points) > 1 else ''}"
        ax.errorbar(bits, shares, [2 * x for x in errors], marker=".", capsize=2, label=label)
    ax.margins(x=0.15)  # room for the names
    ax.set(yscale="log", xlabel="bits per weight of the linears, scales and zero points included")
    ax.set_ylabel("held-out KL to the 16-bit model, share of plain NF4's")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize=8)
    fig.draw_without_rendering()  # so that places of texts are known
    name_points(ax, names)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def name_points(ax: Axes, names: Sequence[tuple[str, float, float]]) -> None:
    """Writes each name beside its (x, y), above or below it where another name is in the way."""
    taken: list[Bbox] = []
    for name, x, y in sorted(names, key=lambda one: one[1]):
        for offset in (-3, 8, -14, 19, -25):
            text = ax.annotate(name, (x, y), (6, offset), textcoords="offset points", fontsize=7)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = ax.annotate(name, (x, y), (6, -3), textcoords="offset points", fontsize=7)
        taken.append(text.get_window_extent())


def main() -> None:
    """Join what was found, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("reports/peers"))
    parser.add_argument("--remark", nargs="+", type=_named, default=[], metavar="NAME=TEXT")
    options = parser.parse_args()
    parts = [json.loads((folder / "peers.json").read_text()) for folder in options.folders]
    found = joined(parts)
    print(write({**found, "remarks": {**found["remarks"], **dict(options.remark)}}, options.out))


def _named(text: str) -> tuple[str, str]:
    name, _, remark = text.partition("=")
    return name, remark


if __name__ == "__main__":
    main()
