"""Is fine-tuning steadier on the dynamic model than on standard 4-bit, and does it follow 16-bit?

    python -m tests.benchmarks.stability [--models demo-outliers demo] [--seeds 0 1 2] [--steps 200]

A new kind of question is learned: of a product card, everything that the model knows to say, in the reverse
order. Each base (16-bit, standard 4-bit, dynamic) is trained by `qprobe finetune` on the same lines in the
same order for each seed, and judged on held-out cards of the new kind and on held-out scenes of the old
kinds, which it may forget. Manifests are those of `qprobe scan` with 64 scenes. A finished run is kept in
--work and not made again; the report is written from what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qprobe.demo.evaluate import greedy_answers, score
from qprobe.demo.scenes import HELD_OUT_SEED, TRAINING_SEED, scenes
from qprobe.options import Base, FinetuneOptions, ScanOptions
from qprobe.records import Sample
from qprobe.scanning import scan
from qprobe.training.bases import load_base, load_finetuned
from qprobe.training.finetune import finetune
from tests.benchmarks.stability_report import write_report

BASES: tuple[Base, ...] = ("16-bit", "nf4", "dynamic")
MODELS = ("demo-outliers", "demo")
LINES, JUDGED = 240, 48
PROMPT = "List what you see, the last thing first."
BATCH = 4  # at once, in place of four batches of one line: the same step for less time on a CPU


@dataclass(frozen=True)
class Outcome:
    """One run. Shares of facts stated right, 0 to 1, are on held-out scenes of the new and the old kinds.

    losses: (step, loss of its batch), nats per answer token.
    """

    model: str
    base: str
    seed: int
    steps: int
    losses: tuple[tuple[int, float], ...]
    eval_loss_before: float
    eval_loss: float
    new_before: float
    new_after: float
    old_before: float
    old_after: float
    seconds: float


def reversed_questions(count: int, seed: int) -> list[Sample]:
    """`count` product cards with the new question and its answer."""
    cards = [x for x in scenes(4 * count, seed) if x.kind == "e-commerce"]
    return [
        replace(x, prompt=PROMPT, answer=", ".join(f.phrase for f in reversed(x.facts)) + ".") for x in cards
    ]


def write_lines(path: Path, samples: Sequence[Sample]) -> Path:
    """A JSONL file of conversations with its images beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, x in enumerate(samples):
        image = f"{path.stem}-{number}.png"
        (path.parent / image).write_bytes(x.image or b"")
        turns = [{"from": "human", "value": f"<image>\n{x.prompt}"}, {"from": "gpt", "value": x.answer}]
        lines.append(json.dumps({"image": image, "conversations": turns}))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def manifest_of(model: str, work: Path, device: str | None) -> Path:
    """The manifest of a small scan of `model`, made once."""
    run = work / "scans" / model
    if not (run / "skiplist.json").is_file():
        scan(ScanOptions(model, samples=64, out=run, device=device))
    return run / "skiplist.json"


def judge(model: Any, processor: Any, old: Sequence[Sample], new: Sequence[Sample]) -> tuple[float, float]:
    """Shares of facts stated right: (of the new kind, of the old kinds)."""
    answers = [greedy_answers(model, processor, x, batch=JUDGED) for x in (new, old)]
    return score(new, answers[0]).share, score(old, answers[1]).share


def one_run(model: str, base: Base, seed: int, steps: int, work: Path, device: str | None) -> Outcome:
    """Trains and judges one base with one seed; a finished one is read from `work`."""
    kept = work / "outcomes" / f"{model}-{base}-{seed}-{steps}.json"
    if kept.is_file():
        found = json.loads(kept.read_text())
        return Outcome(**{**found, "losses": tuple(map(tuple, found["losses"]))})
    manifest = manifest_of(model, work, device)
    train, held_out = work / "data" / "train.jsonl", work / "data" / "held-out.jsonl"
    if not held_out.is_file():
        write_lines(train, reversed_questions(LINES, TRAINING_SEED + 77))
        write_lines(held_out, reversed_questions(JUDGED, HELD_OUT_SEED + 77))
    new, old = reversed_questions(JUDGED, HELD_OUT_SEED + 77), scenes(JUDGED, HELD_OUT_SEED + 78)
    before = judge(*load_base(manifest, base, model, device), old, new)
    out = work / "adapters" / f"{model}-{base}-{seed}-{steps}"
    done = finetune(
        FinetuneOptions(
            manifest, train, out, base, model, device, eval_data=held_out, steps=steps, batch_size=BATCH,
            accumulation=1, seed=seed, save_every=steps,
        )
    )  # fmt: skip
    after = judge(*load_finetuned(out, model, device), old, new)
    assert done.eval_loss is not None and done.eval_loss_before is not None
    outcome = Outcome(
        model, base, seed, done.steps, done.history, done.eval_loss_before, done.eval_loss,
        before[0], after[0], before[1], after[1], done.seconds,
    )  # fmt: skip
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(asdict(outcome)))
    return outcome


def main() -> None:
    """Run what is missing and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("runs/stability"))
    parser.add_argument("--out", type=Path, default=Path("reports/training"))
    parser.add_argument("--device")
    options = parser.parse_args()
    if torch.cuda.is_available() and options.device is None:
        options.device = "cuda"
    outcomes = []
    for model in options.models:
        for seed in options.seeds:
            for base in BASES:
                x = one_run(model, base, seed, options.steps, options.work, options.device)
                outcomes.append(x)
                last = statistics.fmean(loss for _, loss in x.losses[-20:])
                print(
                    f"{model:14} {base:8} seed {seed}: loss {last:.4f} held out {x.eval_loss:.4f}; facts "
                    f"right new {x.new_before:.3f} -> {x.new_after:.3f}, old {x.old_before:.3f} -> "
                    f"{x.old_after:.3f}; {x.seconds:.0f} s",
                    flush=True,
                )
                write_report([asdict(x) for x in outcomes], options.out)


if __name__ == "__main__":
    main()
