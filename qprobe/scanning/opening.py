"""The opening step of a scan: the model under measurement, and the run folder of what it is measured for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qprobe.calibration.room import check_limit
from qprobe.calibration.settings import settings
from qprobe.calibration.tuning import tune_steps
from qprobe.inputs.batch import Batch
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.loaded import loaded_reference
from qprobe.loading.reference import Reference, reference_of
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.spread import devices_for
from qprobe.loading.stored import cached_folder, mixed_note
from qprobe.measure.digests import inputs_digest, reading_digest
from qprobe.measure.nonfinite import first_finite
from qprobe.measure.runner import applicable_measures
from qprobe.measure.subject import Subject, limited_subject, subject_of
from qprobe.records import FormatSpec, Sample
from qprobe.runs.damaged import set_aside_damaged
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import VERSION, Key, Measures, Rounding, Spec, named_batches
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.check import check_inventory
from qprobe.scanning.process import Process
from qprobe.scanning.samples import ScanSamples
from qprobe.system.versions import library_versions


def open_model(
    skeleton: Skeleton, asked: ScanRequest, process: Process, processed: ProcessedSamples
) -> Subject:
    """The model of `skeleton`, loaded and with its 4-bit form beside it.

    processed: of the scan's samples, which are chosen already.
    Raises QprobeError, before anything is measured, for what this model can never be asked.
    """
    with process.clock.stage("load"):
        device, on_host = devices_for(process.shard, asked.device), asked.max_memory_bytes is not None
        if asked.loaded is None:
            reference = reference_of(skeleton, device, on_host, processed.processor)
        else:
            reference = loaded_reference(asked.loaded, skeleton, device, processed.processor)
    with process.clock.stage("weights"):
        subject = _subject(reference, asked, processed)
        check_inventory(subject.inventory, subject.model, asked.skiplist, asked.ablate)
        if asked.format.is_calibrated:
            check_limit(subject)
    return subject


def _subject(reference: Reference, asked: ScanRequest, processed: ProcessedSamples) -> Subject:
    """The subject of `reference`, within a limit if there is one."""
    fmt, limit_bytes, folder = asked.format, asked.max_memory_bytes, asked.folder.absolute()
    if limit_bytes is None:
        return subject_of(reference, fmt, processed)
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    is_found = asked.why_limited is not None
    return limited_subject(reference, fmt, limit_bytes, there, processed, is_found)


def open_units(subject: Subject, work: ScanSamples, asked: ScanRequest, run: RunFolder) -> Measures:
    """What can be measured on this model; opens the run folder for it, or resumes what is there."""
    first = subject.encode(work.calibration[0])
    finite = first_finite(subject, work.calibration)

    def applicable(group: Sequence[Sample] | None) -> tuple[Measures, tuple[str, ...]]:
        batch = None if group is None else subject.encode(tuple(group))
        return applicable_measures(subject, batch, asked.measures.names, asked.measures.nodes)

    tried = () if finite is None else subject.halving.run("the first pass", finite, applicable)
    measures, notes = tried[0][1] if tried else applicable(None)
    tune = tune_steps(subject, asked.tune)
    chosen = settings(subject, tune, asked.drawn_texts) if asked.format.is_calibrated else None
    run.open(run_key(subject, asked.format, measures, work.batches, first, asked.samples.seed, chosen))
    limited = () if asked.why_limited is None else (asked.why_limited,)
    run.notes.add("start", (*work.notes, *notes, *limited, *_mixed(subject, asked)))
    set_aside_damaged(run)
    return measures


def _mixed(subject: Subject, asked: ScanRequest) -> tuple[str, ...]:
    """A note on a checkpoint whose weights lie in several dtypes."""
    folder = cached_folder(asked.source) if asked.loaded is None else None
    note = mixed_note(folder, subject.reference.skeleton.dtype) if folder is not None else None
    return () if note is None else (note,)


def run_key(
    subject: Subject,
    fmt: FormatSpec,
    measures: Measures,
    batches: Mapping[str, Sequence[Sequence[Sample]]],
    first: Batch,
    seed: int,
    rounding: Rounding | None = None,
) -> Key:
    """The key of a run: two runs with equal keys give the same units.

    batches: of samples, by what is measured on them. first: one of them. rounding: of calibrated weights.
    """
    reference = subject.reference
    samples = [s for groups in batches.values() for group in groups for s in group]
    spec = Spec(
        weights=subject.weights_digest,
        device=reference.device.type,
        measures=measures,
        processor=inputs_digest(first),
        reading=reading_digest(reference.processor, samples),
        calibration=named_batches(batches["calibration"]),
        codes=named_batches(batches["codes"]),
        isolated=named_batches(batches["isolated"]),
        held_out=named_batches(batches["held_out"]),
        seed=seed,
        rounding=rounding,
        versions=library_versions(),
    )
    return Key(VERSION, reference.identity, fmt, subject.inventory, spec)
