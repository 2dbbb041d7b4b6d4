"""The course of a comparison: the same samples in the same batches for one model after another.

Of the model that sets it only its answers and the logits of its answer tokens stay, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qprobe.checkpoint.storage import StoredBytes, stored_bytes
from qprobe.data.sampling import Wanted, choose_samples, unanswered_note, wanted_by
from qprobe.errors import ModelError
from qprobe.inputs.answers import Batching, answered
from qprobe.inputs.batch import reads_images
from qprobe.inputs.decoder import layout_of
from qprobe.inputs.halving import Halving, free_memory
from qprobe.inputs.metrics import Metric, metric_of, metrics_for
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import Skeleton
from qprobe.measure.kl import ANSWERS, KlSums, read_out
from qprobe.options import Progress, SampleOptions
from qprobe.records import Sample, Score
from qprobe.selection.verdict import fewer_measured


@dataclass(frozen=True)
class AskedCourse:
    """What a course is asked to be. metric: of the answers, beside KL; None for none."""

    samples: Wanted
    batching: Batching
    metric: Metric | None


def asked_course(options: SampleOptions) -> AskedCourse:
    """What `options` ask for. Raises QprobeError for a metric that is none."""
    metric = None if options.metric is None else metric_of(options.metric)
    return AskedCourse(wanted_by(options), Batching(options.batch_size, options.max_new_tokens), metric)


@dataclass(frozen=True)
class ModelResult:
    """What one model did: its bytes, its greedy answers, its KL sums by sample, all in sample order.

    scores: of the answers, for each metric of the course. notes: of batches that ran in parts.
    """

    stored: StoredBytes
    answers: list[str]
    sums: list[KlSums]
    scores: list[tuple[Score, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Course:
    """What every model is put through: the same samples in the same batches.

    samples: their answers are those whose tokens count. groups: indices of the samples of each batch.
    logits: the 16-bit model's for each sample, (answer tokens, vocabulary) on the CPU.
    given: the samples as they were given, which metrics read. metrics: of the answers. batching: of answers.
    """

    samples: tuple[Sample, ...]
    groups: list[list[int]]
    logits: list[Tensor]
    given: tuple[Sample, ...]
    metrics: tuple[Metric, ...]
    batching: Batching

    def scores(self, answers: Sequence[str]) -> list[tuple[Score, ...]]:
        """What `answers` score, for each metric."""
        return [metric.scores(self.given, answers) for metric in self.metrics]


def staged(progress: Progress, name: str) -> Progress:
    """Reports the two stages of one model, "answers" and "kl", as the stage `name` of `progress`."""

    def report(stage: str, done: int, total: int) -> None:
        progress(name, done + (total if stage == "kl" else 0), 2 * total)

    return report


def set_course(
    model_id: str,
    skeleton: Skeleton,
    load: Callable[[Any], Any],
    asked: AskedCourse,
    report: Progress,
    default_metric: Metric | None = None,
) -> tuple[Course, ModelResult, tuple[str, ...]]:
    """The course that the model of `load` sets, its own result, and notes on the samples.

    skeleton: of that model; samples that its processor cannot read show before `load` is called with that.
    default_metric: where none was asked for and samples bring answers.
    """
    processor = load_processor(skeleton.source)
    if processor is None:
        raise ModelError(f"{model_id} has no tokenizer beside its weights, so it cannot answer.")
    processed = ProcessedSamples(processor, getattr(torch, skeleton.dtype), layout_of(skeleton.model))
    chosen = choose_samples(model_id, reads_images(processor), asked.samples, "compare", processed.refusal)
    model, halving = load(processor), Halving()
    own = answered(model, processed, chosen.samples, asked.batching, report, halving)
    answers = [s.answer or "" for s in own]
    has_answers = any(s.answer is not None for s in chosen.samples)
    metrics = metrics_for(asked.metric or (default_metric if has_answers else None), chosen.samples)
    scores = [metric.scores(chosen.samples, answers) for metric in metrics]  # a mistake shows before all else
    samples = tuple(
        mine if given.answer is None else given for given, mine in zip(chosen.samples, own, strict=True)
    )
    index = {id(sample): i for i, sample in enumerate(samples)}
    parts = processed.batches(samples, asked.batching.size)
    groups = [[index[id(sample)] for sample in part] for part in parts]
    logits: dict[int, Tensor] = {}
    for group, rows in _logits(model, processed, samples, groups, halving):
        logits.update(zip(group, (_compact(x, model.dtype) for x in rows), strict=True))
        report("kl", len(logits), len(samples))
    ordered = [logits[i] for i in range(len(samples))]
    course = Course(samples, groups, ordered, chosen.samples, metrics, asked.batching)
    sums = [KlSums(0.0, len(x), len(x)) for x in ordered]
    result = ModelResult(stored_bytes(model), answers, sums, scores)
    left_out = (note for metric in metrics for note in metric.left_out(chosen.samples))
    fewer = fewer_measured(len(samples), 0, asked.samples.count)
    told = (*chosen.notes, *unanswered_note(chosen.samples, asked.samples), *left_out, *fewer)
    return course, result, (*told, *halving.notes)


def run_course(load: Callable[[], tuple[Any, Any]], course: Course, report: Progress) -> ModelResult:
    """The result of the model that `load` gives, (model, processor); the model is gone afterwards."""
    free_memory()
    model, processor = load()
    stored = stored_bytes(model)
    processed = ProcessedSamples(processor, model.dtype, layout_of(model))
    halving = Halving()
    own = answered(model, processed, course.samples, course.batching, report, halving)
    answers = [s.answer or "" for s in own]
    scores = course.scores(answers)
    sums: dict[int, KlSums] = {}
    for group, rows in _logits(model, processed, course.samples, course.groups, halving):
        reference = [course.logits[i].float() for i in group]
        sums.update(zip(group, ANSWERS.sums(reference, rows), strict=True))
        report("kl", len(sums), len(course.samples))
    ordered = [sums[i] for i in range(len(course.samples))]
    return ModelResult(stored, answers, ordered, scores, halving.notes)


@torch.inference_mode()
def _logits(
    model: Any,
    processed: ProcessedSamples,
    samples: Sequence[Sample],
    groups: list[list[int]],
    halving: Halving,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Each batch with the logits of its samples' answer tokens, (answer tokens, vocabulary) on the CPU."""

    def read(part: Sequence[int]) -> list[Tensor]:
        batch = processed.batch([samples[i] for i in part])
        return [x.cpu() for x in read_out(model, batch.to(model.device))]

    for group in groups:
        for part, rows in halving.run("logits", group, read):
            yield list(part), rows


def _compact(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """`logits` in the model's 16-bit dtype where that loses nothing: half the memory."""
    small = logits.to(dtype)
    return small if torch.equal(small.float(), logits) else logits
