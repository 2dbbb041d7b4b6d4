"""A 16-bit model with its samples, and the 4-bit bases that are made of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qprobe.calibration.correction import best_correction
from qprobe.calibration.damage import split_samples
from qprobe.calibration.gptq import metric_of, shrunk
from qprobe.calibration.gram import Gathering, SharedInput, gathered, shared_inputs
from qprobe.calibration.token_weights import token_weights
from qprobe.calibration.tuning import Given, tune
from qprobe.demo.scenes import CALIBRATION_SEED, HELD_OUT_SEED, TRAINING_SEED, scenes
from qprobe.formats.nf4 import Nf4
from qprobe.inputs.batch import Batch
from qprobe.inputs.encoding import IGNORED
from qprobe.loading.reference import load_reference
from qprobe.manifest.read import read_manifest
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec, Sample
from qprobe.scanning.scan import scan
from tests.benchmarks.calibration import rounded, stored
from tests.benchmarks.models import smollm2_folder, texts
from tests.benchmarks.stability import reversed_questions
from tests.benchmarks.starts.lanes import Adapter

MODELS = ("demo-outliers", "smollm2")
BASES = ("calibrated", "tuned", "nf4", "dynamic")
STARTS = ("zero", "loftq", "corrected", "distilled")
RANK = 16
TUNE_STEPS = 200
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Asked:
    """One process. at_once: seeds that train side by side. work: where the scan of the dynamic base goes.
    starts: of which the first one is zero. calibration, training, judged: samples. batch: samples of a step.
    tokens: of a passage.
    """

    model: str
    base: str
    device: str
    seeds: tuple[int, ...]
    at_once: int
    steps: int
    distill: int
    calibration: int
    training: int
    judged: int
    batch: int
    tokens: int
    work: Path
    starts: tuple[str, ...] = STARTS


@dataclass(frozen=True)
class Task:
    """A 16-bit model, and samples of sets that share nothing. location: what its loaders take."""

    subject: Subject
    location: str
    calibration: list[Sample]
    training: list[Sample]
    judged: list[Sample]
    held_out: list[Sample]

    def inputs(self, samples: Iterable[Sample], size: int) -> list[Inputs]:
        """Batches of at most `size`, as a training step takes them: labels on the answers alone."""
        groups = self.subject.groups(tuple(samples), size)
        return [labelled(self.subject.encode(x).in_dtype(self.subject.dtype)) for x in groups]


def labelled(batch: Batch) -> Inputs:
    """The inputs of `batch`, with labels."""
    labels = torch.full_like(batch.inputs["input_ids"], IGNORED)
    for row, (start, end) in enumerate(batch.answers):
        labels[row, start:end] = batch.inputs["input_ids"][row, start:end]
    return {**batch.inputs, "labels": labels}


def open_task(asked: Asked) -> Task:
    """The model of `asked` on its device, with its samples; in float32 on a CPU."""
    is_text = asked.model == "smollm2"
    location = str(without_template(asked.work)) if is_text else asked.model
    reference = load_reference(location, asked.device)
    if asked.device == "cpu":
        reference.model.float()
    subject = subject_of(reference, FormatSpec())
    if is_text:
        passages, held_out = texts(
            reference.processor, max(asked.calibration, asked.training, asked.judged), asked.tokens
        )
        calibration, training = passages[: asked.calibration], passages[: asked.training]
        judged = held_out[: asked.judged]
        return Task(subject, location, calibration, training, judged, judged)
    return Task(
        subject,
        location,
        scenes(asked.calibration, CALIBRATION_SEED),
        reversed_questions(asked.training, TRAINING_SEED + 77),
        reversed_questions(asked.judged, HELD_OUT_SEED + 77),
        scenes(2 * asked.judged, HELD_OUT_SEED),
    )


def without_template(work: Path) -> Path:
    """SmolLM2's folder without a chat template, so that passages are plain text everywhere."""
    from transformers import AutoTokenizer

    folder = work / "smollm2"
    if not folder.is_dir():
        shutil.copytree(smollm2_folder(), folder, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
        tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_folder())
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Prepared:
    """What calibration gathers. leaders: of each linear that has a Gram matrix of its own inputs."""

    inputs: list[SharedInput]
    gathering: Gathering
    outputs: Mapping[str, Tensor]

    @property
    def leaders(self) -> dict[str, str]:
        apart = self.gathering.apart
        return {name: one.leader for one in self.inputs for name in one.names if name not in apart}


def prepared(task: Task) -> Prepared:
    """The Gram matrices of the calibration samples, half weighted as `nf4-calibrated` does."""
    subject = task.subject
    batches = [subject.encode(x) for x in subject.groups(tuple(task.calibration), 8)]
    inputs = shared_inputs(subject, batches)
    part = [b.in_dtype(subject.path.dtype) for b in batches]
    with walking(subject.path):
        weights = token_weights(subject, inputs, part)
        return Prepared(inputs, gathered(subject, inputs, part, weights=weights.of), weights.outputs)


def base_weights(task: Task, asked: Asked, given: Prepared) -> dict[str, Tensor]:
    """What the 4-bit weights of the base read as, by layer; layers that it keeps in 16-bit are not there."""
    subject = task.subject
    nearest = {name: Nf4().stored(subject.modules[name].weight) for name in sorted(subject.quantized)}
    if asked.base == "dynamic":
        rows = [{"prompt": x.prompt, "answer": x.answer} for x in task.calibration[:32]]
        data = {"data": rows} if asked.model == "smollm2" else {"samples": 64}
        run = scan(task.location, out=asked.work / f"scan-{asked.model}", device=asked.device, **data)
        kept = set(read_manifest(run.skiplist).skip_modules)
        nearest = {name: x for name, x in nearest.items() if name not in kept}
    found = nearest
    if asked.base in ("calibrated", "tuned"):
        used_up = copy(given.gathering)
        used_up.grams = dict(given.gathering.grams)
        results = rounded(subject, used_up, given.inputs, given.outputs)
        nearest_only = [name for name, x in results.items() if x.stored is None]
        assert 10 * len(nearest_only) < len(results), f"not calibrated: {', '.join(nearest_only)}"
        found = {**nearest, **stored(subject, results)}
    if asked.base == "tuned":
        training, kept_back = (
            [subject.encode(x) for x in subject.groups(tuple(part), 8)]
            for part in split_samples(task.calibration)
        )
        found = tune(subject, found, Given(training, kept_back), TUNE_STEPS, Nf4()).stored
    return {name: x.packed().unpack() for name, x in found.items()}


def corrections(residuals: Mapping[str, Tensor], given: Prepared) -> Adapter:
    """The closed form for every 4-bit weight that has a Gram matrix. residuals: W - W-hat."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, leader in given.leaders.items():
        gram = given.gathering.grams[leader]
        metric = metric_of(shrunk(gram.total, gram.tokens)) if name in residuals else None
        if metric is not None:
            with torch.no_grad():
                left, right = best_correction(residuals[name], metric, RANK, given.outputs.get(name))
            found[name] = (right, left)
    return found
