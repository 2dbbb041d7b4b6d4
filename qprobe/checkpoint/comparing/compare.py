"""16-bit, standard 4-bit and dynamic 4-bit side by side on the same held-out samples.

The three models are loaded one after another; of the 16-bit one only its answers and the logits of
its answer tokens stay, on the CPU.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qprobe.checkpoint.load import check_model, codes_of, dynamic_4bit, standard_4bit, with_dtype
from qprobe.checkpoint.storage import StoredBytes, stored_bytes
from qprobe.data.sampling import choose_samples, unanswered_note, wanted_by
from qprobe.errors import ModelError, QprobeError, RunError
from qprobe.inputs.answers import answered
from qprobe.inputs.batch import image_token_id, reads_images
from qprobe.inputs.metrics import Metric, metric_of, metrics_for
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.device import one_device
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.processor import load_processor
from qprobe.loading.reference import reference_of
from qprobe.loading.skeleton import Skeleton
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest
from qprobe.measure.kl import ANSWERS, KlSums, read_out, readout_of, refuse_unread
from qprobe.options import (
    AskedMetric,
    BadData,
    CompareOptions,
    Dtype,
    Progress,
    Turns,
    data_of,
    no_progress,
    path_if_given,
    path_of,
)
from qprobe.records import Sample, Score
from qprobe.runs.folder import RunFolder
from qprobe.runs.scored import Scored, scored
from qprobe.runs.statistics import ratio
from qprobe.selection.verdict import fewer_measured


@dataclass(frozen=True)
class Row:
    """One model of the comparison; shares are 0 to 1, None is what does not apply.

    kl: nats per answer token to the 16-bit model; kl_se: its standard error over samples.
    top1_agreement: share of answer tokens with the same most probable token.
    answer_agreement: share of samples with exactly the 16-bit model's greedy answer.
    """

    name: str
    parameter_bytes: int
    total_bytes: int
    kl: float | None
    kl_se: float | None
    top1_agreement: float | None
    answer_agreement: float


@dataclass(frozen=True)
class ComparedSample:
    """The greedy answers to one prompt; answers: row name -> text."""

    id: str
    prompt: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; notes are sentences a reader must see (skipped files).

    metrics: of the greedy answers, for all rows: the facts of the samples where they bring some, and the one
    that was asked for.
    """

    rows: tuple[Row, ...]
    samples: tuple[ComparedSample, ...]
    metrics: tuple[Scored, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object of `compare --json`: rows, metrics and samples."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "metrics": [metric.to_json() for metric in self.metrics],
            "samples": [asdict(s) for s in self.samples],
        }


@dataclass(frozen=True)
class ModelResult:
    """What one model did: its bytes, its greedy answers, its KL sums by sample, all in sample order.

    scores: of the answers, for each metric of the course.
    """

    stored: StoredBytes
    answers: list[str]
    sums: list[KlSums]
    scores: list[tuple[Score, ...]]


@dataclass(frozen=True)
class Course:
    """What every model is put through: the same samples in the same batches.

    samples: their answers are those whose tokens count. groups: indices of the samples of each batch.
    logits: the 16-bit model's for each sample, (answer tokens, vocabulary) on the CPU.
    given: the samples as they were given, which metrics read. metrics: of the answers.
    """

    samples: tuple[Sample, ...]
    groups: list[list[int]]
    logits: list[Tensor]
    given: tuple[Sample, ...]
    metrics: tuple[Metric, ...]

    def scores(self, answers: Sequence[str]) -> list[tuple[Score, ...]]:
        """What `answers` score, for each metric."""
        return [metric.scores(self.given, answers) for metric in self.metrics]


@quiet_models()
def compare(
    manifest: str | Path,
    *,
    model: str | None = None,
    images: str | Path | None = None,
    data: Any = None,
    prompt: str | None = None,
    samples: int | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    seed: int = 0,
    batch_size: int = 4,
    max_new_tokens: int = 64,
    turns: Turns = "each",
    split: str | None = None,
    bad_data: BadData = "refuse",
    allow_downloads: bool = False,
    metric: AskedMetric | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> Comparison:
    """The models on held-out samples, see `Row`: three, or five where the manifest has calibrated weights.

    Where the manifest lies in a run folder, the result is left there as compare.json, for the report.

    manifest: the skiplist.json of a scan.
    model: where the 16-bit weights are; None for the id that the manifest names.
    images, data, prompt, samples, seed: as in `qprobe.scan`; built-in samples are other ones than a scan's.
    device: as in `qprobe.scan`. dtype: of everything in 16-bit; None for the manifest's compute_dtype.
    batch_size: samples that run at once. max_new_tokens: longest answer, where a sample brings none.
    turns, split, bad_data, allow_downloads: as in `qprobe.scan`.
    metric: of the greedy answers, beside KL: one of `qprobe.registry.metrics.names()`, or any function of
        (sample, answer) to a number; the sample's answer is None where none was given.
    trust_remote_code: as of `qprobe.load_dynamic_4bit`.
    progress: called as work moves on, see `qprobe.options.Progress`.
    Raises ManifestError if the manifest is broken or for another model, SampleError if no sample is
    usable, QprobeError for a model without a language head, or for a sample that `metric` fails on.
    """
    options = CompareOptions(
        manifest=path_of(manifest),
        model=model,
        images=path_if_given(images),
        data=data_of(data),
        prompt=prompt,
        samples=samples,
        device=device,
        dtype=dtype,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        turns=turns,
        split=split,
        bad_data=bad_data,
        allow_downloads=allow_downloads,
        metric=metric,
        trust_remote_code=trust_remote_code,
    )
    return run_comparison(options, progress)


def run_comparison(options: CompareOptions, progress: Progress) -> Comparison:
    """`compare` as `options` ask."""
    if options.metric is not None:
        metric_of(options.metric)
    manifest = read_manifest(options.manifest)
    skeleton = check_model(manifest, options.model, options.trust_remote_code)
    refuse_unread(skeleton.model)
    if readout_of(skeleton.model) != ANSWERS:
        raise QprobeError(
            f"{manifest.model.id} ({manifest.model.architecture}) has no language head, so there are no "
            f"answers to compare. The layer table of its scan shows weight and activation error."
        )
    wanted = replace(manifest, format=with_dtype(manifest.format, options.dtype))
    skeleton = skeleton.in_dtype(wanted.format.compute_dtype)
    course, reference, notes = set_course(
        manifest.model.id,
        skeleton,
        lambda processor: reference_of(skeleton, options.device, processor=processor).model,
        options,
        staged(progress, "16-bit"),
    )
    loaders = _loaders(wanted, skeleton, options)
    results = {"16-bit": reference}
    for name, load in loaders.items():
        results[name] = run_course(load, course, options, staged(progress, name))
    comparison = compared(results, course, notes)
    return replace(comparison, notes=(*notes, *keep(comparison, manifest, options.manifest.parent)))


def compared(results: Mapping[str, ModelResult], course: Course, notes: tuple[str, ...]) -> Comparison:
    """What `results` say, by row name; the first is that of the model that set `course`."""
    reference = next(iter(results.values()))
    return Comparison(
        rows=tuple(row(name, result, reference) for name, result in results.items()),
        samples=tuple(
            ComparedSample(s.id, s.prompt, {name: result.answers[i] for name, result in results.items()})
            for i, s in enumerate(course.samples)
        ),
        metrics=tuple(
            scored(metric.name, metric.is_share, {name: result.scores[i] for name, result in results.items()})
            for i, metric in enumerate(course.metrics)
        ),
        notes=notes,
    )


def keep(comparison: Comparison, manifest: Manifest, folder: Path) -> tuple[str, ...]:
    """Leave `comparison` as FOLDER/compare.json if `folder` is a run folder, see `qprobe.report.comparison`.

    A note if the disk refuses: what was measured is worth more than an error.
    """
    run = RunFolder(folder)
    if not run.is_there:
        return ()
    kept = {"skip_modules": list(manifest.skip_modules), **comparison.to_json()}
    data = (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode()
    try:
        run.files.write({"compare.json": (data, len(comparison.rows))})
    except RunError as error:
        return (f"The report lacks this comparison: {error}",)
    return ()


def _loaders(
    manifest: Manifest, skeleton: Skeleton, options: CompareOptions
) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """What loads the 4-bit models, by row name: each is a function to (model, processor).

    Of a manifest of calibrated weights also those weights with nothing kept, and, as "dynamic-NAME" of the
    precision that they are stored as, its list with weights that are rounded to nearest.
    """
    spec, codes = manifest.format, codes_of(manifest, options.manifest.parent)
    device = one_device(options.device)  # the 4-bit models are a quarter as large
    nearest = spec.four_bit_name
    found = {
        nearest: partial(standard_4bit, skeleton, spec, device, None),
        "dynamic": partial(dynamic_4bit, manifest, skeleton, device, codes),
    }
    if codes is not None:
        plain = replace(manifest, format=replace(spec, name=nearest), codes=None)
        found |= {
            spec.name: partial(standard_4bit, skeleton, spec, device, codes),
            f"dynamic-{nearest}": partial(dynamic_4bit, plain, skeleton, device, None),
        }
    order = (nearest, spec.name, f"dynamic-{nearest}", "dynamic")
    return {name: partial(_with_processor, found[name], skeleton) for name in order if name in found}


def _with_processor(load: Callable[[], Any], skeleton: Skeleton) -> tuple[Any, Any]:
    """(model, processor): each model reads with a processor of its own, as a user's would."""
    return load(), load_processor(skeleton.source)


def staged(progress: Progress, name: str) -> Progress:
    """Reports the two stages of one model, "answers" and "kl", as the stage `name` of `progress`."""

    def report(stage: str, done: int, total: int) -> None:
        progress(name, done + (total if stage == "kl" else 0), 2 * total)

    return report


def _free_memory() -> None:
    """Gives back what the last model held, before the next one loads."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def set_course(
    model_id: str,
    skeleton: Skeleton,
    load: Callable[[Any], Any],
    options: CompareOptions,
    report: Progress,
    default_metric: str | None = None,
) -> tuple[Course, ModelResult, tuple[str, ...]]:
    """The course that the model of `load` sets, its own result, and notes on the samples.

    skeleton: of that model; samples that its processor cannot read show before `load` is called with that.
    default_metric: where none was asked for and samples bring answers.
    """
    processor = load_processor(skeleton.source)
    if processor is None:
        raise ModelError(f"{model_id} has no tokenizer beside its weights, so it cannot answer.")
    processed = ProcessedSamples(processor, getattr(torch, skeleton.dtype), image_token_id(skeleton.config))
    wanted = wanted_by(options)
    chosen = choose_samples(model_id, reads_images(processor), wanted, "compare", processed.refusal)
    model = load(processor)
    own = answered(model, processed, chosen.samples, options.max_new_tokens, options.batch_size, report)
    answers = [s.answer or "" for s in own]
    has_answers = any(s.answer is not None for s in chosen.samples)
    metrics = metrics_for(options.metric or (default_metric if has_answers else None), chosen.samples)
    scores = [metric.scores(chosen.samples, answers) for metric in metrics]  # a mistake shows before all else
    samples = tuple(
        mine if given.answer is None else given for given, mine in zip(chosen.samples, own, strict=True)
    )
    index = {id(sample): i for i, sample in enumerate(samples)}
    parts = processed.batches(samples, options.batch_size)
    groups = [[index[id(sample)] for sample in part] for part in parts]
    logits: dict[int, Tensor] = {}
    for group, rows in _logits(model, processed, samples, groups):
        logits.update(zip(group, (_compact(x, model.dtype) for x in rows), strict=True))
        report("kl", len(logits), len(samples))
    ordered = [logits[i] for i in range(len(samples))]
    course = Course(samples, groups, ordered, chosen.samples, metrics)
    sums = [KlSums(0.0, len(x), len(x)) for x in ordered]
    result = ModelResult(stored_bytes(model), answers, sums, scores)
    left_out = (note for metric in metrics for note in metric.left_out(chosen.samples))
    fewer = fewer_measured(len(samples), 0, options.samples)
    return course, result, (*chosen.notes, *unanswered_note(chosen.samples, wanted), *left_out, *fewer)


def run_course(
    load: Callable[[], tuple[Any, Any]], course: Course, options: CompareOptions, report: Progress
) -> ModelResult:
    """The result of the model that `load` gives, (model, processor); the model is gone afterwards."""
    _free_memory()
    model, processor = load()
    stored = stored_bytes(model)
    processed = ProcessedSamples(processor, model.dtype, image_token_id(model.config))
    own = answered(model, processed, course.samples, options.max_new_tokens, options.batch_size, report)
    answers = [s.answer or "" for s in own]
    scores = course.scores(answers)
    sums: dict[int, KlSums] = {}
    for group, rows in _logits(model, processed, course.samples, course.groups):
        reference = [course.logits[i].float() for i in group]
        sums.update(zip(group, ANSWERS.sums(reference, rows), strict=True))
        report("kl", len(sums), len(course.samples))
    ordered = [sums[i] for i in range(len(course.samples))]
    return ModelResult(stored, answers, ordered, scores)


@torch.inference_mode()
def _logits(
    model: Any, processed: ProcessedSamples, samples: Sequence[Sample], groups: list[list[int]]
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Each batch with the logits of its samples' answer tokens, (answer tokens, vocabulary) on the CPU."""
    for group in groups:
        batch = processed.batch([samples[i] for i in group])
        yield group, [x.cpu() for x in read_out(model, batch.to(model.device))]


def _compact(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """`logits` in the model's 16-bit dtype where that loses nothing: half the memory."""
    small = logits.to(dtype)
    return small if torch.equal(small.float(), logits) else logits


def row(name: str, result: ModelResult, reference: ModelResult) -> Row:
    """The numbers of one model."""
    kl, kl_se = ratio([s.kl for s in result.sums], [s.tokens for s in result.sums])
    top1, _ = ratio([s.top1_agree for s in result.sums], [s.tokens for s in result.sums])
    same = sum(mine == theirs for mine, theirs in zip(result.answers, reference.answers, strict=True))
    return Row(
        name=name,
        parameter_bytes=result.stored.parameter_bytes,
        total_bytes=result.stored.total_bytes,
        kl=kl,
        kl_se=kl_se,
        top1_agreement=top1,
        answer_agreement=same / len(result.answers),
    )
