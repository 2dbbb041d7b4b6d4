"""Where an adapter begins on a 4-bit base, and where training takes it from there.

    python -m tests.benchmarks.starts [--models demo-outliers smollm2] [--device cuda] [--seeds 0 1 2]
        [--starts S ...] [--steps 200] [--distill 200] [--calibration 128] [--jobs 4] [--out DIR]

Bases: codes and scales `calibrated` (untuned), all layers in 4-bit; the same `tuned`; every linear in plain
`nf4`; and `dynamic`, the list of `qprobe scan` at +10 % on that. Starts, at rank 16 on the linears that
`finetune` adapts: `zero`; `loftq`, the decomposition of W - W-hat of peft's replace_lora_weights_loftq;
`corrected`, the closed form of `qprobe.calibration.correction` with the Gram matrices that calibration
gathers; `distilled`, that after --distill steps of `qprobe.training.distilled`. The last two are held beside
a fresh adapter, which alone is trained, as `finetune` does; on request the correction itself is trained in
other ways (`variants.py`).

The KL is to the 16-bit model in nats per answer token on held-out samples, before the first step. Training
is that of `finetune` (AdamW, 2e-4, batches of 4), on the weights that the 4-bit codes read as, which is what
bitsandbytes multiplies by; the starts of a seed, and then of other seeds, train side by side (`lanes.py`).
`smollm2` (see tests/benchmarks/models.py) calibrates and trains on 128 passages of Python's help topics and
is judged on 48 of other topics, each of --tokens tokens. `demo-outliers` calibrates on 128 scenes, learns
the new kind of question of tests/benchmarks/stability.py, and its KL is on 96 held-out scenes of the old
kinds. On a CPU, most of which emulate bf16, everything is in float32.

Each base is a process of its own, --jobs of them side by side, and DIR is rewritten whenever one of them
knows more, so that a run that is cut keeps what it had.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.models import TEXT_TOKENS
from tests.benchmarks.starts.bases import (
    BASES,
    MODELS,
    STARTS,
    Asked,
    without_template,
)
from tests.benchmarks.starts.measured import measure
from tests.benchmarks.starts.report import keep
from tests.benchmarks.starts.variants import TRAINED

TRAINING = {"smollm2": 128, "demo-outliers": 240}


def main() -> None:
    """Measure every base and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=(*STARTS, *TRAINED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--distill", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--calibration", type=int, default=128, help="samples")
    parser.add_argument("--training", type=int, help=f"samples; else {TRAINING}")
    parser.add_argument("--tokens", type=int, default=TEXT_TOKENS, help="of a passage")
    parser.add_argument("--judged", type=int, default=48, help="held-out samples; twice as many old scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--at-once", type=int, default=2, help="seeds that train side by side")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("reports/starts"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if "smollm2" in options.models:
            without_template(Path(work))  # once, before the processes
        asked = [
            Asked(
                model,
                base,
                options.device,
                tuple(options.seeds),
                options.at_once,
                options.steps,
                options.distill,
                options.calibration,
                options.training or TRAINING[model],
                options.judged,
                options.batch,
                options.tokens,
                Path(work),
                ("zero", *(x for x in options.starts if x != "zero")),
            )
            for model in options.models
            for base in options.bases
        ]
        context = multiprocessing.get_context("spawn")  # CUDA bears no fork
        with ProcessPoolExecutor(options.jobs, context, max_tasks_per_child=1) as pool:
            tell = partial(keep, options.out, _command(options))
            for future in as_completed([pool.submit(measure, x, tell) for x in asked]):
                future.result()
    print((options.out / "starts.md").read_text())


def _command(options: Any) -> str:
    said = {key: x for key, x in vars(options).items() if x is not None and key not in ("out", "jobs")}
    words = (f"--{key.replace('_', '-')} {_words(x)}" for key, x in said.items())
    return f"python -m tests.benchmarks.starts {' '.join(words)}"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
