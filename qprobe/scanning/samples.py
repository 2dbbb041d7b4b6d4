"""The samples of a scan: chosen, answered, split, and cut into batches."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qprobe.calibration.settings import samples_wanted
from qprobe.data.sampling import choose_samples, independent_of, scan_count, split_held_out, unanswered_note
from qprobe.errors import ModelError, SampleError
from qprobe.inputs.batch import cut, reads_images, vision_token_ids
from qprobe.inputs.decoder import Layout, layout_of
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.device import DTYPES, pick_device
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.spread import devices_for
from qprobe.measure.kl import EMBEDDINGS, readout_of
from qprobe.measure.nonfinite import first_nonfinite
from qprobe.measure.runner import isolated_half
from qprobe.measure.subject import Subject, processed_samples
from qprobe.records import Sample
from qprobe.scanning.answers import with_answers
from qprobe.scanning.asked.recorded import data_name
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.process import Process
from qprobe.system.wording import counted

Groups = list[tuple[Sample, ...]]


@dataclass(frozen=True)
class ScanSamples:
    """The samples of a scan, cut into batches.

    calibration: measured for the layer table. isolated: those of them whose isolated KL is measured, see
    `isolated_half`, in batches as full as the others, so that a device sees few shapes. held_out: measured
    for the selection alone, maybe none. codes: more samples, to which calibrated codes are fitted. others: of
    another kind, on which damage is said as well. answered: ids of samples that brought no answer of their
    own. share: of rows left out, in a sentence. silent: how many samples are left out since the model answers
    nothing to them.
    """

    calibration: Groups
    isolated: Groups
    held_out: Groups
    notes: tuple[str, ...]
    answered: frozenset[str] = frozenset()
    codes: Groups = field(default_factory=list)
    others: Groups = field(default_factory=list)
    share: str | None = None
    silent: int = 0

    def as_given(self, sample: Sample) -> Sample:
        """`sample` without the answer that the reference gave it."""
        return replace(sample, answer=None) if sample.id in self.answered else sample

    @property
    def batches(self) -> dict[str, Groups]:
        """By what is measured on them, as the specification of a run names it."""
        return {
            "calibration": self.calibration,
            "codes": self.codes,
            "isolated": self.isolated,
            "held_out": self.held_out,
        }

    @property
    def samples(self) -> int:
        return sum(len(group) for group in (*self.calibration, *self.held_out))


def cut_samples(
    subject: Subject,
    calibration: tuple[Sample, ...],
    held_out: tuple[Sample, ...],
    size: int,
    notes: tuple[str, ...],
) -> ScanSamples:
    """The work on these samples, in batches of at most `size`."""
    half = isolated_half(calibration)
    groups = subject.one_shape_groups(calibration)
    isolated = [[sample for sample in group if sample.id in half] for group in groups]
    return ScanSamples(cut(groups, size), cut(isolated, size), subject.groups(held_out, size), notes)


@dataclass(frozen=True)
class Chosen:
    """The samples of a scan as they were given, all of which the model's processor takes.

    processed: what it made of them. more: samples beyond the measured ones, to which codes may be fitted.
    others: of another kind, see `ScanRequest.others`.
    """

    processed: ProcessedSamples
    samples: tuple[Sample, ...]
    more: tuple[Sample, ...]
    notes: tuple[str, ...]
    share: str | None = None
    others: tuple[Sample, ...] = ()

    @property
    def unanswered(self) -> frozenset[str]:
        """Ids of those that bring no answer of their own."""
        return frozenset(s.id for s in (*self.samples, *self.more) if s.answer is None)


def read_samples(skeleton: Skeleton, asked: ScanRequest, process: Process) -> Chosen:
    """The samples of a scan, read and processed before the model's weights are.

    Raises SampleError if none is usable, ModelError for a model without a tokenizer.
    """
    source, model_id = skeleton.source, skeleton.source.id
    processor = load_processor(source) if asked.loaded is None else deepcopy(asked.loaded.processor)
    if processor is None:
        raise ModelError(
            f"{model_id} has no tokenizer beside its weights, so it reads no samples. Add its files."
        )
    model: Any = skeleton.model if skeleton.is_buildable else None
    dtype = DTYPES[skeleton.dtype] if model is None else model.dtype
    layout = Layout(vision_token_ids(skeleton.config)) if model is None else layout_of(model)
    processed = processed_samples(processor, layout, dtype, asked.max_memory_bytes)
    count = scan_count(model_id, asked.samples)
    fit_to = 0
    if asked.format.is_calibrated and model is not None:
        fit_to = samples_wanted(model, _device(asked, process), asked.calibration_samples)
    wanted = replace(asked.samples, count=count + max(0, fit_to - (count - count // 3)))
    pairs = model is not None and readout_of(model) is EMBEDDINGS

    def refusal(sample: Sample) -> str | None:
        if pairs and not sample.images:
            return f"it has no image, and a {type(model).__name__} reads each text with one"
        return processed.refusal(sample)

    found = choose_samples(model_id, reads_images(processor), wanted, "scan", refusal)
    more = found.samples[count:]
    if asked.calibration_samples is None:  # generating answers would take longer than all of calibration
        more = tuple(s for s in more if s.answer is not None)
    chosen = Chosen(processed, found.samples[:count], more, found.notes, found.share)
    if asked.others is None:
        return chosen
    others = choose_samples(model_id, reads_images(processor), asked.others, "scan", refusal)
    kept = independent_of(others.samples, found.samples)
    if not kept:
        raise SampleError(
            f"Of --check-data {data_name(asked.others.data)} {counted(len(others.samples), 'sample')} would "
            "be measured, and each begins as one that is measured already. Pass samples of another kind."
        )
    alike = _alike_note(data_name(asked.others.data), len(others.samples), len(kept))
    return replace(chosen, others=kept, notes=(*chosen.notes, *others.notes, *alike))


def _alike_note(name: str, given: int, kept: int) -> tuple[str, ...]:
    """A sentence if some of `given` samples in the data `name` begin as one that is measured."""
    if kept == given:
        return ()
    begin = "begins" if given - kept == 1 else "begin"
    what = f"{counted(given - kept, 'sample')} of {name} {begin} as one that is measured"
    return (f"{what}, so {kept:,} of {given:,} say what 4-bit costs on another kind.",)


def _device(asked: ScanRequest, process: Process) -> torch.device:
    """Where the model will be, or one of the devices."""
    named = devices_for(process.shard, asked.device)
    if asked.loaded is not None and named.kind is None:
        return next(asked.loaded.model.parameters()).device
    return pick_device(named.one)


def prepare_samples(subject: Subject, chosen: Chosen, asked: ScanRequest, process: Process) -> ScanSamples:
    """The scan's samples with answers, split and cut into batches.

    Raises SampleError if no sample is usable.
    """
    batching, notes = asked.batching, list(chosen.notes)
    samples, more, others = chosen.samples, chosen.more, chosen.others
    if subject.answers:
        notes += unanswered_note(samples, asked.samples)
        given = (samples, more, others)
        samples, more, others = (with_answers(subject, some, batching, process) for some in given)
        notes += why_silent(subject, tuple(s for s in (*samples, *more, *others) if not s.answer))
        samples, more, others = (tuple(s for s in some if s.answer) for some in (samples, more, others))
    if not samples:
        raise SampleError(
            f"None of the {counted(len(chosen.samples), 'sample')} has an answer to measure ({notes[-1]}). "
            "Pass other prompts, or another --dtype where values are not finite."
        )
    calibration, held_out = split_held_out(samples)
    if subject.readout is not None and not held_out:
        few = "No sample is held out: that takes three with different first questions"
        notes.append(f"{few}. The list is chosen by its score.")
    work = cut_samples(subject, calibration, held_out, batching.size, tuple(notes))
    codes = subject.groups(independent_of(more, held_out), batching.size)
    silent = len(chosen.samples) - len(samples)
    work = replace(work, codes=codes, others=subject.groups(others, batching.size))
    return replace(work, answered=chosen.unanswered, share=chosen.share, silent=silent)


def why_silent(subject: Subject, samples: tuple[Sample, ...]) -> list[str]:
    """For each sample that the model answers nothing to, why it is left out."""
    notes = []
    for sample in samples:
        with subject.running("finite"):
            layer = first_nonfinite(subject, (sample,))
        why = f"in 16-bit its values are not finite from {layer} on" if layer else "the model answers nothing"
        notes.append(f"{sample.id}: left out, {why}")
    return notes
