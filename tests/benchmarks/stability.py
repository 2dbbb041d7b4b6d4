"""Is fine-tuning steadier on the dynamic model than on standard 4-bit, and does it follow 16-bit?

    python -m tests.benchmarks.stability [--models M ...] [--bases B ...] [--seeds 0 1 2] [--steps 200]
        [--jobs N]

A new kind of question is learned: of a product card, everything that the model knows to say, in the reverse
order. A model is `demo`, `demo-outliers` or a folder of `tests.benchmarks.backbone`. Each base is trained by
`qprobe finetune` on the same lines in the same order for each seed, and judged on held-out cards of the new
kind and on held-out scenes of the old kinds, which it may forget. Bases: 16-bit; standard 4-bit, `nf4`;
dynamic; `calibrated`, dynamic on calibrated weights; `corrected`, the same with an adapter that begins at the
correction of these weights. Manifests are those of `qprobe scan` with 64 scenes. Each run is a process of its
own with one thread (unless OMP_NUM_THREADS says otherwise), --jobs of them side by side. A finished run is
kept in --work and not made again under the same conditions (sources, models,
machine, versions, threads); the report is written after each run, from what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import qprobe
from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.demo.evaluate import greedy_answers, score
from qprobe.demo.folder import demo_folder
from qprobe.demo.outliers import outliers_folder
from qprobe.demo.scenes import CALIBRATION_SEED, HELD_OUT_SEED, TRAINING_SEED, scenes
from qprobe.options import Base, Start
from qprobe.records import Sample, asked
from qprobe.scanning.scan import scan
from qprobe.system.files import write_atomic
from qprobe.system.versions import library_versions
from qprobe.training.bases import load_base
from qprobe.training.finetune import finetune
from qprobe.training.origin import load_finetuned
from tests.benchmarks.backbone_study import rows_of
from tests.benchmarks.hardware import made_with
from tests.benchmarks.stability_report import write_report


@dataclass(frozen=True)
class Trained:
    """What a line of the study trains. calibrated: on the manifest of a scan with calibrated weights."""

    base: Base
    calibrated: bool = False
    start: Start = "zero"


BASES: Mapping[str, Trained] = {
    "16-bit": Trained("16-bit"),
    "nf4": Trained("nf4"),
    "dynamic": Trained("dynamic"),
    "calibrated": Trained("dynamic", calibrated=True),
    "corrected": Trained("dynamic", calibrated=True, start="corrected"),
}
MODELS = ("demo-outliers", "demo")
LINES, JUDGED, SCANNED = 240, 48, 64
PROMPT = "List what you see, the last thing first."
RANK = 16
BATCH = 4  # at once, in place of four batches of one line: the same step for less time on a CPU


@dataclass(frozen=True)
class Outcome:
    """One run. Shares of facts stated right, 0 to 1, are on held-out scenes of the new and the old kinds.

    losses: (step, loss of its batch), nats per answer token. made_with: hardware and versions.
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
    made_with: str


@dataclass(frozen=True)
class Run:
    """One run to make. base: a name in `BASES`; device: None for the best there is."""

    model: str
    base: str
    seed: int
    steps: int
    work: Path
    device: str | None
    key: str

    @property
    def trained(self) -> Trained:
        return BASES[self.base]

    @property
    def name(self) -> str:
        """Of its file and its adapter's folder in `work`."""
        return f"{self.title}-{self.base}-{self.seed}-{self.steps}-{self.key}"

    @property
    def title(self) -> str:
        """The model's, without the path of its folder."""
        return Path(self.model).name


def conditions(device: str | None, folders: Iterable[Path] = ()) -> dict[str, Any]:
    """Everything beside a run's own fields that its outcome depends on, in JSON values.

    folders: of models that are trained on beside the embedded ones.
    """
    package = Path(qprobe.__file__).parent
    sources = [*package.rglob("*.py"), Path(__file__)]
    weights = [
        x for folder in (demo_folder(), outliers_folder(), *folders) for x in folder.rglob("*") if x.is_file()
    ]
    return {
        "sources": files_key(x for x in sources if x.parent.name not in ("cli", "report")),  # which only show
        "models": files_key(weights),
        "made_with": made_with(device),
        "versions": library_versions() | {name: version(name) for name in ("numpy", "pillow", "peft")},
        "device": device,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def files_key(files: Iterable[Path]) -> str:
    """SHA-256 over the bytes of `files`, in the order of their names."""
    digests = [hashlib.sha256(x.read_bytes()).hexdigest() for x in sorted(files)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def key_of(found: Mapping[str, Any]) -> str:
    """`conditions` as a short name."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def reversed_questions(count: int, seed: int) -> list[Sample]:
    """`count` product cards with the new question and its answer."""
    cards = [x for x in scenes(4 * count, seed) if x.kind == "e-commerce"]
    return [
        replace(
            x, turns=asked(PROMPT, *x.images), answer=", ".join(f.phrase for f in reversed(x.facts)) + "."
        )
        for x in cards
    ]


def write_lines(path: Path, samples: Sequence[Sample]) -> Path:
    """A JSONL file of conversations with its images beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, x in enumerate(samples):
        image = f"{path.stem}-{number}.png"
        (path.parent / image).write_bytes(x.images[0])
        turns = [{"from": "human", "value": f"<image>\n{x.prompt}"}, {"from": "gpt", "value": x.answer}]
        lines.append(json.dumps({"image": image, "conversations": turns}))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def write_data(work: Path, key: str) -> tuple[Path, Path]:
    """(lines to train on, held-out lines), written once for the conditions `key`."""
    train, held_out = (work / f"data-{key}" / name for name in ("train.jsonl", "held-out.jsonl"))
    if not held_out.is_file():
        write_lines(train, reversed_questions(LINES, TRAINING_SEED + 77))
        write_lines(held_out, reversed_questions(JUDGED, HELD_OUT_SEED + 77))
    return train, held_out


def make_manifest(run: Run) -> Path:
    """The manifest of a small scan of the model of `run`, made once for its conditions."""
    calibrated = run.trained.calibrated
    folder = run.work / "scans" / f"{run.title}-{'calibrated-' if calibrated else ''}{run.key}"
    if not (folder / "skiplist.json").is_file():
        more = {"format": "nf4-calibrated", "keep_correction": RANK} if calibrated else {}
        rows = rows_of(scenes(SCANNED, CALIBRATION_SEED)) if run.model not in MODELS else None
        scan(run.model, data=rows, samples=SCANNED, out=folder, device=run.device, **more)
    return folder / "skiplist.json"


def judge(model: Any, processor: Any, old: Sequence[Sample], new: Sequence[Sample]) -> tuple[float, float]:
    """Shares of facts stated right: (of the new kind, of the old kinds)."""
    answers = [greedy_answers(model, processor, x, batch=JUDGED) for x in (new, old)]
    return score(new, answers[0]).share, score(old, answers[1]).share


def at_start(run: Run, manifest: Path) -> tuple[Any, Any]:
    """(model, processor) before the first step."""
    if run.trained.start == "zero":  # an adapter that adds nothing
        return load_base(manifest, run.trained.base, run.model, run.device)
    return load_dynamic_4bit(manifest, run.model, run.device, start=run.trained.start, rank=RANK)


def kept_outcome(run: Run) -> Outcome | None:
    """The outcome of `run` in its `work`; None if it is not finished or lacks what is reported now."""
    path = run.work / "outcomes" / f"{run.name}.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if found.keys() != {x.name for x in fields(Outcome)}:
        return None
    return Outcome(**{**found, "losses": tuple(map(tuple, found["losses"]))})


def make(run: Run) -> Outcome:
    """Trains and judges one base with one seed, and keeps the outcome."""
    manifest = make_manifest(run)
    train, held_out = write_data(run.work, run.key)
    new, old = reversed_questions(JUDGED, HELD_OUT_SEED + 77), scenes(JUDGED, HELD_OUT_SEED + 78)
    trained = run.trained
    before = judge(*at_start(run, manifest), old, new)
    out = run.work / "adapters" / run.name
    shutil.rmtree(out, ignore_errors=True)  # of a run that was killed before it was judged
    done = finetune(
        manifest, data=train, out=out, base=trained.base, start=trained.start, rank=RANK, model=run.model,
        device=run.device, eval_data=held_out, steps=run.steps, batch_size=BATCH, accumulation=1,
        seed=run.seed, save_every=run.steps,
    )  # fmt: skip
    after = judge(*load_finetuned(out, run.model, run.device), old, new)
    assert done.eval_loss is not None and done.eval_loss_before is not None
    outcome = Outcome(
        run.title, run.base, run.seed, done.steps, done.history, done.eval_loss_before, done.eval_loss,
        before[0], after[0], before[1], after[1], done.seconds, made_with(run.device),
    )  # fmt: skip
    kept = run.work / "outcomes" / f"{run.name}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, json.dumps(asdict(outcome)).encode())
    return outcome


def make_all(runs: Sequence[Run], jobs: int, out: Path) -> list[str]:
    """Makes the missing ones of `runs` in `jobs` processes and writes the report; the failures, in words."""
    outcomes = {run: outcome for run in runs if (outcome := kept_outcome(run)) is not None}
    missing = [run for run in runs if run not in outcomes]
    failures = []
    # Spawned, each for one run: a thread count is read when torch is imported, and CUDA bears no fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        needed = {(run.model, run.trained.calibrated): run for run in missing}.values()
        for scanned in [pool.submit(make_manifest, x) for x in needed]:
            scanned.result()
        futures = {pool.submit(make, run): run for run in missing}
        for future in as_completed(futures):
            run = futures[future]
            try:
                outcomes[run] = future.result()
            except Exception as error:  # the others are hours of work
                failures.append(f"{run.name}: {type(error).__name__}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
            else:
                print(line_of(outcomes[run]), flush=True)
                write_report([asdict(outcomes[x]) for x in runs if x in outcomes], out)
    if outcomes:
        write_report([asdict(outcomes[run]) for run in runs if run in outcomes], out)
    return failures


def line_of(x: Outcome) -> str:
    """One outcome as a line of the log."""
    last = statistics.fmean(loss for _, loss in x.losses[-20:])
    return (
        f"{x.model:14} {x.base:10} seed {x.seed}: loss {last:.4f} held out {x.eval_loss:.4f}; facts right "
        f"new {x.new_before:.3f} -> {x.new_after:.3f}, old {x.old_before:.3f} -> {x.old_after:.3f}; "
        f"{x.seconds:.0f} s"
    )


def main() -> None:
    """Run what is missing and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/stability"))
    parser.add_argument("--out", type=Path, default=Path("reports/training"))
    parser.add_argument("--device")
    options = parser.parse_args()
    # Before any child starts: it is on import that a process reads them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    folders = [Path(x) for x in options.models if x not in MODELS]
    key = key_of(conditions(options.device, folders))
    write_data(options.work, key)
    runs = [
        Run(model, base, seed, options.steps, options.work, options.device, key)
        for model in options.models
        for seed in options.seeds
        for base in options.bases
    ]
    sys.exit(1 if make_all(runs, options.jobs, options.out) else 0)


if __name__ == "__main__":
    main()
