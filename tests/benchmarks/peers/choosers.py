"""Which layers other tools would leave in 16-bit, beside ours: each list on our formats.

    python -m tests.benchmarks.peers.choosers [--device cuda] [--python TOOL=PATH ...] [--brute-force 3]
        [--model FOLDER] [--plain-only]

Versions that were tried, beside those of `tests.benchmarks.peers`: pip install nvidia-modelopt==0.47.0

A budget is a share of the bytes that NF4 saves. AutoScheme and ModelOpt count bits their own way (with
16-bit scales and zero points, and without any), so the budget is translated into theirs, and the bits per
weight that the list takes on our format stand beside its KL. Ours keep fused groups whole, as `qprobe scan`
does; ModelOpt does the same, AutoScheme does not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import fsum
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from qprobe.runs.statistics import ratio_se
from tests.benchmarks.peers.declared import CHOOSERS, OURS, SHARES
from tests.benchmarks.peers.opening import Opened, add_options, begun, opened
from tests.benchmarks.peers.passages import OWN
from tests.benchmarks.peers.running import run

COMMAND = "python -m tests.benchmarks.peers.choosers"
PLACED = ("nf4", "nf4-calibrated")


def main() -> None:
    """Run every chooser that can be run, and write results and table after each list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [x.name for x in CHOOSERS]
    parser.add_argument("--choosers", nargs="+", choices=names, default=names)
    parser.add_argument("--brute-force", type=int, default=0, help="batches of 8 that brute force measures")
    parser.add_argument("--plain-only", action="store_true", help="put lists on plain NF4 alone")
    add_options(parser)
    options = parser.parse_args()
    placed = PLACED[:1] if options.plain_only else PLACED
    with opened(options) as task:
        found = begun(options.out / "choosers.json", task)
        weights = made_weights(task, placed)
        plain = {name: task.judge.kl(one)[OWN] for name, one in weights.items()}
        for peer in (x for x in CHOOSERS if x.name in options.choosers):
            more = {"passages": str(task.passages), "brute_force": options.brute_force, "placed": placed}
            out = task.work / peer.worker
            found["missing"].pop(peer.name, None)
            why = run(replace(peer, options={**peer.options, **more}), task.task, out, task.machine)
            if why:
                found["missing"][peer.name] = why
                print(f"{peer.name}: {why}", flush=True)
            for path in sorted(out.glob("*.lists.json")):
                row = measured(task, path, weights) | {"plain": plain}
                found["rows"] = [x for x in found["rows"] if x["name"] != row["name"]] + [row]
                write(found, options.out)
            write(found, options.out)
    print((options.out / "choosers.md").read_text())


def made_weights(task: Opened, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The formats that lists are put on."""
    found = {}
    for name in names:
        peer = next(x for x in OURS if x.name == name)
        out = task.work / name
        why = run(
            replace(peer, options={**peer.options, "bits": (), "passages": str(task.passages)}),
            task.task,
            out,
            task.machine,
        )
        if why:
            raise SystemExit(why)
        found[name] = load_file(out / name / "weights.safetensors", device=task.machine.device)
    return found


def measured(task: Opened, path: Path, weights: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One chooser: for each share and format, bits per weight and the KL of each held-out passage."""
    handed = json.loads(path.read_text())
    layers, names = task.judge.subject.layers, task.judge.subject.quantized
    sizes = {n: layers[n].in_features * layers[n].out_features for n in names}
    budgets = {}
    for share, kept in handed["lists"].items():
        taken = fsum(16 * sizes[n] if n in kept else 8 * layers[n].bytes_4bit for n in names)
        kl = {
            x: task.judge.kl({n: w for n, w in one.items() if n not in kept})[OWN]
            for x, one in weights.items()
        }
        budgets[share] = {"bits": taken / sum(sizes.values()), "kept": len(kept), "kl": kl}
    name = path.name.removesuffix(".lists.json")
    costs = {key: handed[key] for key in ("seconds", "peak_bytes", "versions")}
    return {"name": name, "budgets": budgets, **costs}


def write(found: dict[str, Any], out: Path) -> None:
    """choosers.json, and a table for each format."""
    (out / "choosers.json").write_text(json.dumps(found))
    missing = [f"- not run: {name}: {why}" for name, why in found["missing"].items()]
    parts = [f"    {COMMAND}\n", f"{found['model']}. {found['machine']}.\n", *missing]
    parts += [table(rows, x) for x in PLACED if (rows := [y for y in found["rows"] if x in y["plain"]])]
    (out / "choosers.md").write_text("\n".join(parts) + "\n")


def table(rows: list[dict[str, Any]], placed: str) -> str:
    """Markdown: held-out KL as a share of plain NF4's, and bits per weight."""
    head = [f"+{float(share):.0%}".replace("%", " %") for share in SHARES]
    lines = [
        f"\n### On {placed}\n",
        f"| list by | {' | '.join(head)} | seconds |",
        f"|{'---|' * (len(head) + 2)}",
    ]
    for row in sorted(rows, key=lambda x: fsum(x["budgets"]["0.1"]["kl"][placed])):
        whole = row["plain"]["nf4"]
        cells = []
        for share in SHARES:
            one = row["budgets"][str(share)]
            kl = one["kl"][placed]
            cells.append(f"{fsum(kl) / fsum(whole):.3f} ± {ratio_se(kl, whole):.3f} ({one['bits']:.2f} bits)")
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
