"""Codes of merged weights, calibrated again: fitted to what the merged model in 16-bit computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qprobe.calibration.calibrate import calibrate_model, calibration_notes
from qprobe.calibration.settings import settings
from qprobe.calibration.tuning import tune_steps
from qprobe.calibration.work import Groups, Work
from qprobe.checkpoint.adapters.effect import weight_of
from qprobe.checkpoint.comparing.course import AskedCourse
from qprobe.checkpoint.ready import is_four_bit
from qprobe.data.sampling import Wanted, choose_samples, independent_of, scan_count
from qprobe.errors import is_out_of_memory
from qprobe.inputs.answers import answered
from qprobe.inputs.batch import reads_images
from qprobe.inputs.decoder import layout_of
from qprobe.inputs.halving import free_memory
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.device import DTYPES, pick_device
from qprobe.loading.processor import load_processor
from qprobe.loading.reference import Reference, reference_of
from qprobe.measure.subject import Subject, processed_samples, subject_of
from qprobe.options import Progress
from qprobe.records import FormatSpec, Sample
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import VERSION, Key, Measures, Spec, named_batches
from qprobe.system.devices import parse_device
from qprobe.system.versions import library_versions
from qprobe.system.wording import counted
from qprobe.training.merging.forms import Job, fold

NEAREST = "Codes were not calibrated again, since {why}: they are rounded to nearest."


def fitted_codes(
    job: Job, asked: AskedCourse, judges: Sequence[Sample], folder: Path, progress: Progress
) -> tuple[Path | None, tuple[str, ...]]:
    """(the file of codes in `folder`, notes): of the base's own weights with the adapter added.

    They are fitted as a scan of that model in 16-bit would fit them, to samples that are none of `judges`,
    which `asked` chose: rows of the data behind those, and where there are none, built-in samples for scans.
    None, with a note on why, where no sample is left, or memory does not suffice for that model.
    """
    processor = load_processor(job.skeleton.source)
    processed = processed_samples(processor, layout_of(job.skeleton.model), DTYPES[job.skeleton.dtype])
    samples = fitting_samples(job.origin.manifest.model.id, processed, asked.samples, tuple(judges))
    free_memory()
    try:
        if samples:
            return _fitted(job, asked, samples, processed, folder, progress)
        why = "every sample that there is judges"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = "memory does not suffice for the merged model in 16-bit beside its 4-bit form"
    finally:
        free_memory()
    return None, (NEAREST.format(why=why),)


def fitting_samples(
    model_id: str, processed: ProcessedSamples, wanted: Wanted, judges: tuple[Sample, ...]
) -> tuple[Sample, ...]:
    """At most as many samples as a scan takes that are none of `judges`; see `fitted_codes`."""
    count, sees = scan_count(model_id, wanted), reads_images(processed.processor)
    more = replace(wanted, count=len(judges) + count, bad_data="skip")
    builtin = Wanted(seed=wanted.seed, count=count, bad_data="skip")
    for one in (more, builtin):
        found = choose_samples(model_id, sees, one, "scan", processed.refusal).samples
        if left := independent_of(found, judges)[:count]:
            return left
    return ()


def _fitted(
    job: Job,
    asked: AskedCourse,
    samples: tuple[Sample, ...],
    processed: ProcessedSamples,
    folder: Path,
    progress: Progress,
) -> tuple[Path | None, tuple[str, ...]]:
    fmt, reference = job.origin.manifest.format, _merged_in_16bit(job, processed)
    free_memory()  # of the base
    subject = subject_of(reference, fmt, processed)
    own = answered(subject.model, processed, samples, asked.batching, halving=subject.halving)
    both = zip(samples, own, strict=True)
    ready = tuple(mine if given.answer is None else given for given, mine in both)
    groups = subject.groups(tuple(x for x in ready if x.answer), asked.batching.size)
    if not groups:
        return None, (NEAREST.format(why="the model answers nothing to other samples"),)
    run, tune = RunFolder(folder), tune_steps(subject, None)
    run.open(_key(subject, fmt, groups, tune, asked.samples.seed))

    def calibrate(parts: Groups) -> None:
        given = [tuple(part) for part in parts]
        calibrate_model(Work(subject, run, given, tune_steps=tune, progress=progress))

    subject.halving.run_all("calibration", groups, calibrate)
    assert run.codes is not None
    told = f"Codes were calibrated again on {counted(sum(map(len, groups)), 'sample')}, none of which judges."
    return folder / run.codes.file, (told, *calibration_notes(run), *subject.halving.notes)


def _merged_in_16bit(job: Job, processed: ProcessedSamples) -> Reference:
    """The base's own weights, dequantized where they are in 4-bit, with the adapter added, in 16-bit."""
    one = parse_device(str(pick_device(job.device)))
    reference = reference_of(job.skeleton, one, processor=processed.processor)
    base = reference.model
    if job.origin.base != "16-bit":
        base, _ = job.base(job.origin.base)
        for name, module in base.named_modules():
            if is_four_bit(module):
                reference.model.get_submodule(name).weight.data.copy_(weight_of(module))
    fold(reference.model, job.adapter, job.origin.manifest.format, base)
    return reference


def _key(subject: Subject, fmt: FormatSpec, groups: Groups, tune: int, seed: int) -> Key:
    """The key of a run that has codes and measures nothing."""
    reference = subject.reference
    spec = Spec(
        weights=subject.weights_digest,
        device=reference.device.type,
        measures=Measures(propagated=False, sensitivity=False),
        calibration=named_batches(groups),
        seed=seed,
        rounding=settings(subject, tune),
        versions=library_versions(),
    )
    return Key(VERSION, reference.identity, fmt, subject.inventory, spec)
