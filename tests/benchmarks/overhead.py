"""What each command costs beside the arithmetic of the model, in seconds of processor time.

    python -m tests.benchmarks.overhead [--before CHECKOUT] [--parts narrow,demo,commands]

narrow: a default scan of a model with all 522 linears of Llama-3.2-11B-Vision, each 32 wide, so that hardly
anything is left but what is done once per layer, per unit and per picture. demo: one of `demo-outliers` with
16 samples. commands: the light commands, of which --help stands for the start of any. With --before each runs
on that checkout of qprobe too, one right after the other, and what both wrote is compared byte by byte.
Prints Markdown. Processor time, so that whatever else the machine does changes little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.alone import run_alone
from tests.benchmarks.checkpoints import geometry, processor, write_checkpoint, write_samples

HERE = Path(__file__).parents[2]
SAME = ("layers.csv", "frontier.csv")
PARTS = ("narrow", "demo", "commands")
# The stages of a scan tell their time by the clock; here it is the one that counts processor time.
CHILD = """
import json, os, runpy, sys, time
sys.path.remove("")  # the folder that this was started in, which need not be the checkout
time.perf_counter = time.process_time
said, sys.argv = sys.argv[1], ["qprobe", *sys.argv[2:]]
try:
    runpy.run_module("qprobe", run_name="__main__")
finally:
    with open(said, "w") as file:
        json.dump(time.process_time(), file)
"""


def narrow(folder: Path, samples: int) -> Sequence[str]:
    """The options that name a model of 522 linears of 32 features, and its samples, written to `folder`."""
    config: Any = geometry(1, is_tiny=False)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.vocab_size = 32, 64, 512
    text.num_attention_heads, text.num_key_value_heads = 4, 2
    vision.hidden_size, vision.intermediate_size, vision.attention_heads, vision.image_size = 32, 64, 4, 56
    vision.vision_output_dim = 32 * (1 + len(vision.intermediate_layers_indices))
    config.image_token_index = 512
    write_checkpoint(folder / "narrow", config, [processor(config)], "cpu")
    data = write_samples(folder / "samples", config, samples)
    return ("--model", str(folder / "narrow"), "--data", str(data), "--samples", str(samples))


def ran(root: Path, arguments: Sequence[str], work: Path) -> tuple[float, str]:
    """(seconds of processor time, stdout) of `qprobe ARGUMENTS` in the checkout `root`; ends if it fails."""
    said = work / "seconds.json"
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = run_alone([sys.executable, "-c", CHILD, str(said), *arguments], environment=environment)
    if done.status:
        raise SystemExit(f"qprobe {' '.join(arguments)}\n{done.err[-3000:]}")
    return json.loads(said.read_text()), done.out


def scan(roots: Sequence[Path], title: str, asked: Sequence[str], work: Path) -> None:
    """The table of one scan in each checkout, stage by stage."""
    columns: list[dict[str, float]] = []
    outs = [work / f"run-{i}" for i in range(len(roots))]
    for root, out in zip(roots, outs, strict=True):
        shutil.rmtree(out, ignore_errors=True)
        command = ("scan", *asked, "--batch-size", "4", "--device", "cpu", "--out", str(out), "--json")
        whole, said = ran(root, command, work)
        stages = json.loads(said)["seconds"]
        columns.append({**stages, "imports and the rest": whole - sum(stages.values()), "all of it": whole})
    table(title, [[name, *(f"{x[name]:.2f}" for x in columns)] for name in columns[-1]], roots)
    for name in SAME if len(roots) > 1 else ():
        texts = {(out / name).read_bytes() for out in outs}
        print(f"{name}: {'equal' if len(texts) == 1 else 'NOT EQUAL'}", flush=True)


def commands(roots: Sequence[Path], run: Path, work: Path) -> None:
    """The table of the light commands on the run folder `run`, which each reads and `select` writes into."""
    manifest = str(run / "skiplist.json")
    rows = []
    for arguments in (
        ("--help",),
        ("scan", "--help"),
        ("models",),
        ("plan", "--model", "llama-3.2-11b-vision"),
        ("rank", str(run)),
        ("select", str(run), "--budget", "+5%"),
        ("report", str(run)),
        ("export", manifest, "--to", "transformers", "--out", str(work / "list.json")),
    ):
        seconds = []
        for root in roots:
            (work / "list.json").unlink(missing_ok=True)
            seconds.append(f"{ran(root, arguments, work)[0]:.2f}")
        shown = " ".join(arguments).replace(str(run), "RUN").replace(str(work), "WORK")
        rows.append([f"`qprobe {shown}`", *seconds])
    table("Commands", rows, roots)


def table(title: str, rows: Sequence[Sequence[str]], roots: Sequence[Path]) -> None:
    """Print it; the last column is this checkout."""
    heads = ["", *(["before"] if len(roots) > 1 else []), "seconds"]
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout to measure beside this one")
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument("--samples", type=int, default=8, help="of the narrow model")
    parser.add_argument("--folder", type=Path, help="where to work; kept if passed")
    options = parser.parse_args()
    roots = [*([options.before.absolute()] if options.before else []), HERE]
    with tempfile.TemporaryDirectory(prefix="qprobe-overhead-") as temporary:
        work = options.folder or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        parts = options.parts.split(",")
        if "narrow" in parts:
            scan(roots, "522 narrow linears", narrow(work, options.samples), work)
        if "demo" in parts:
            scan(roots, "demo-outliers", ("--model", "demo-outliers", "--samples", "16"), work)
        if "commands" in parts:
            ran(HERE, ("scan", "--model", "demo", "--samples", "4", "--out", str(work / "run")), work)
            commands(roots, work / "run", work)


if __name__ == "__main__":
    main()
