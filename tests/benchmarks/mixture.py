"""A mixture of experts at its real size: what scanning and loading it take, in seconds and memory.

    python -m tests.benchmarks.mixture [--layers 48] [--device cuda] [--samples 8] [--parts write,scan,load]

Writes a checkpoint of the exact geometry of Qwen3-30B-A3B, or of its first layers, with seeded random weights
made on the device (56.9 GiB as files of 4 GB, under the names of the hub), and texts of 256 tokens of which
64 are the answer. Then `python -m qprobe scan` and `load_dynamic_4bit` run, each in a process of its own.
Prints Markdown, a row as soon as it is known. The files lie where there is room: in the folder for temporary
files, or else in /dev/shm; in `--folder` they stay for another call. On request: calibrated (the scan with
`--format nf4-calibrated --tune 0`), weight (the scan of the weights alone). `--tiny` checks all on a CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.full_size import GIB, head, machine, parts_of, say
from tests.benchmarks.full_size_parts import Ran, run

PARTS = ("write", "scan", "load")
ON_REQUEST = ("calibrated", "weight")
COLUMNS = "stage | seconds | device peak GiB | host peak GiB"
SHARED_MEMORY = Path("/dev/shm")
TEMPLATE_TOKENS = 4  # bos, user, end, assistant
SPARE_BYTES = 2**29  # for run folders, beside the checkpoint


def geometry(layers: int | None, is_tiny: bool) -> Any:
    """The config of Qwen3-30B-A3B with so many layers; None for all 48. is_tiny: narrow, with 8 experts."""
    from transformers import AutoConfig

    from qprobe.models.geometry import read_geometry
    from tests.tiny import END, PAD

    options = dict(read_geometry("qwen3-30b-a3b").config or {})
    kind = options.pop("model_type")
    if is_tiny:
        options |= {"vocab_size": 384, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8}
        options |= {"num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        options |= {"head_dim": 16, "intermediate_size": 64, "num_hidden_layers": 2}
    if layers is not None:
        options["num_hidden_layers"] = layers
    return AutoConfig.for_model(kind, **options, bos_token_id=1, eos_token_id=END, pad_token_id=PAD)


def model_bytes(config: Any) -> int:
    """Bytes of the weights in 16-bit."""
    from qprobe.loading.skeleton import meta_model

    return sum(x.nbytes for x in meta_model(config, "bfloat16").state_dict().values())


def place(needed: int) -> Path:
    """A new folder with room for `needed` bytes. Exits if there is none."""
    roots = [x for x in (Path(tempfile.gettempdir()), SHARED_MEMORY) if x.is_dir()]
    free = {root: shutil.disk_usage(root).free for root in roots}
    root = next((x for x in roots if free[x] >= needed + SPARE_BYTES), None)
    if root is None:
        there = ", ".join(f"{x} {found / GIB:.1f} GiB" for x, found in free.items())
        sys.exit(f"The checkpoint has {needed / GIB:.1f} GiB, and free are: {there}. Pass fewer --layers.")
    return Path(tempfile.mkdtemp(prefix="qprobe-mixture-", dir=root))


def write_texts(path: Path, count: int) -> None:
    """`count` rows of a prompt and an answer."""
    from tests.benchmarks.checkpoints import PROMPT_TOKENS, SEED, texts

    random = np.random.default_rng(SEED)
    rows = [json.dumps(texts(random, PROMPT_TOKENS - TEMPLATE_TOKENS)) for _ in range(count)]
    path.write_text("\n".join(rows))


@dataclass(frozen=True)
class Bench:
    """What is run on. folder: of the checkpoint, the texts, and the runs."""

    options: argparse.Namespace
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def run_folder(self, name: str) -> Path:
        return self.folder / f"run-{name}"

    def child(self, part: str) -> Ran:
        """The part in a process of its own."""
        o = self.options
        own = ["-m", "tests.benchmarks.mixture", "--child", part, "--folder", str(self.folder)]
        own += ["--device", o.device, "--samples", str(o.samples), "--shard-gb", str(o.shard_gb)]
        own += [] if o.layers is None else ["--layers", str(o.layers)]
        return run([*own, "--tiny"] if o.tiny else own, o.limit)

    def scan(self, name: str, *more: str) -> Ran:
        """`qprobe scan` into the run folder `name`."""
        o = self.options
        asked = ["-m", "qprobe", "scan", "--json", "--model", str(self.model), "--device", o.device]
        asked += ["--out", str(self.run_folder(name))]
        if "weight" not in more:
            asked += ["--data", str(self.folder / "texts.jsonl"), "--samples", str(o.samples)]
            asked += ["--batch-size", str(o.batch_size)]
        limit = [] if o.max_memory is None or "weight" in more else ["--max-memory", o.max_memory]
        return run([*asked, *limit, *more], o.limit)


def row(name: str, seconds: float, device: float | None = None, host: float | None = None) -> None:
    """One line of the table; device and host in bytes."""
    cells = (f"{x / GIB:.1f}" if x is not None else "" for x in (device, host))
    say(f"| {' | '.join([name, f'{seconds:.1f}', *cells])} |")


def whole(name: str, ran: Ran) -> dict[str, Any] | None:
    """The row of a process; what it found, or None, having said why."""
    found = ran.found or {}
    row(f"{name}: the whole process", ran.seconds, found.get("peak_bytes"), ran.host_bytes)
    if ran.found is None:
        say(f"\n```\n{ran.why}\n```\n")
    return ran.found


def scanned(bench: Bench, name: str, what: str, *more: str) -> None:
    """The table of the stages of a scan, and what it says of experts."""
    head(what.capitalize(), COLUMNS)
    found = whole(what, bench.scan(name, *more))
    if found is None:
        return
    for stage, seconds in found["seconds"].items():
        row(f"{what}: {stage}", seconds)
    after = sum(x for stage, x in found["seconds"].items() if stage != "load")
    row(f"{what}: everything after loading", after, found["peak_bytes"])
    say(f"\n{found['verdict']}\n")
    say(experts(bench.run_folder(name)))
    for note in found["notes"]:
        say(f"- {note}")


def experts(folder: Path) -> str:
    """A sentence on how many experts read how many tokens."""
    table = pd.read_csv(folder / "experts.csv")
    if "tokens" not in table or table["tokens"].isna().all():
        return f"{len(table):,} matrices of experts.\n"
    tokens = table["tokens"].fillna(0)
    return (
        f"{len(table):,} matrices of experts, of which {int((tokens == 0).sum()):,} read no token; the "
        f"median read {tokens.median():.0f} and the busiest {tokens.max():.0f}.\n"
    )


def loaded(bench: Bench) -> None:
    """The table of the dynamic 4-bit model, read from the 16-bit checkpoint."""
    head("Loading the list of the scan", COLUMNS)
    found = whole("load in 4-bit", bench.child("load"))
    if found is not None:
        row("load in 4-bit: load_dynamic_4bit", found["seconds"], found["peak_bytes"])
        row("load in 4-bit: what stays", 0.0, found["final_bytes"])


def stages(bench: Bench) -> None:
    """A table of each part that was asked for."""
    o = bench.options
    say(f"\n{machine(o)} {o.samples} samples in batches of {o.batch_size}.")
    if "write" in o.parts:
        head("The checkpoint", COLUMNS)
        if whole("write the checkpoint", bench.child("write")) is None:
            return
    if "weight" in o.parts:
        scanned(bench, "weight", "scan of the weights", "--measures", "weight")
    if "scan" in o.parts:
        scanned(bench, "scan", "default scan")
    if "calibrated" in o.parts:
        scanned(bench, "calibrated", "calibrated scan", "--format", "nf4-calibrated", "--tune", "0")
    if "load" in o.parts:
        loaded(bench)


# What runs in a process of its own ----------------------------------------------------------------------


def child_write(bench: Bench) -> dict[str, Any]:
    from tests.benchmarks.checkpoints import tokenizer, write_checkpoint
    from tests.tiny import chat_template

    o = bench.options
    config = geometry(o.layers, o.tiny)
    config.architectures = ["Qwen3MoeForCausalLM"]
    made = tokenizer(config.vocab_size)
    made.chat_template = chat_template("")
    write_texts(bench.folder / "texts.jsonl", o.samples)
    return {"bytes": write_checkpoint(bench.model, config, [made], o.device, int(o.shard_gb * 1e9))}


def child_load(bench: Bench) -> dict[str, Any]:
    import torch

    from qprobe.checkpoint.experts.four_bit import four_bit_experts
    from qprobe.checkpoint.load import load_dynamic_4bit
    from qprobe.checkpoint.storage import stored_bytes
    from qprobe.measure.memory import peak_bytes

    device = torch.device(bench.options.device)
    manifest = bench.run_folder("scan") / "skiplist.json"
    start = time.perf_counter()
    model, _ = load_dynamic_4bit(manifest, str(bench.model), str(device))
    seconds = time.perf_counter() - start
    assert four_bit_experts(model)
    final = stored_bytes(model).total_bytes
    return {"seconds": seconds, "peak_bytes": peak_bytes(device), "final_bytes": final}


CHILDREN = {"write": child_write, "load": child_load}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the same architecture at a size for a CPU")
    parser.add_argument("--layers", type=int, help="of the model; all by default")
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-memory", help="of the scans, as qprobe takes it; no limit by default")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which a part is killed")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="size of a checkpoint file")
    parser.add_argument("--folder", type=Path, help="where to work; kept if passed")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = parts_of(options.parts, PARTS + ON_REQUEST, parser)
    return options


def main() -> None:
    options = parsed()
    if options.child:
        print(json.dumps(CHILDREN[options.child](Bench(options, options.folder))))
        return
    say(f"    python -m tests.benchmarks.mixture {' '.join(sys.argv[1:])}")
    needed = model_bytes(geometry(options.layers, options.tiny))
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        stages(Bench(options, options.folder))
        return
    folder = place(needed)
    try:
        say(f"\n{needed:,} bytes of weights in {folder.parent}.")
        stages(Bench(options, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
