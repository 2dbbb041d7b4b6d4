"""Codes of merged weights, calibrated again: fitted to what the merged model in 16-bit computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qprobe.calibration.calibrate import calibrate_model, calibration_notes
from qprobe.calibration.settings import samples_wanted, settings
from qprobe.calibration.tuning import tune_steps
from qprobe.calibration.work import Groups, Work
from qprobe.checkpoint.comparing.course import AskedCourse
from qprobe.data.sampling import Wanted, choose_samples, independent_of, scan_count
from qprobe.errors import MachineError, is_out_of_memory
from qprobe.inputs.answers import Batching, answer_group
from qprobe.inputs.batch import reads_images
from qprobe.inputs.decoder import layout_of
from qprobe.inputs.halving import free_memory
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.device import DTYPES, pick_device
from qprobe.loading.processor import load_processor
from qprobe.measure.subject import Subject, processed_samples
from qprobe.options import Progress
from qprobe.records import FormatSpec, Sample
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import VERSION, Key, Measures, Spec, named_batches
from qprobe.system.versions import library_versions
from qprobe.system.wording import counted
from qprobe.training.merging.forms import Job
from qprobe.training.merging.sixteen import merged_subject
from qprobe.training.origin import as_merged

NEAREST = "Codes were not calibrated again, since {why}: they are rounded to nearest."


def fitted_codes(
    job: Job, asked: AskedCourse, judges: Sequence[Sample], folder: Path, progress: Progress
) -> tuple[Path | None, tuple[str, ...]]:
    """(the file of codes in `folder`, notes): of the base's own weights with the adapter added.

    They are fitted as a scan of that model in 16-bit would fit them, to samples that are none of `judges`,
    which `asked` chose: rows of the data behind those, and where there are none, built-in samples for scans.
    Layers that the adapter leaves as they are need none, nor do those that the checkpoint keeps in 16-bit.
    None, with a note on why, where no layer or no sample is left, or memory does not suffice for that model.
    """
    layers = _changed_4bit(job)
    if not layers:
        return None, ("No codes were calibrated again, since the adapter changes no layer in 4-bit.",)
    processor = load_processor(job.skeleton.source)
    processed = processed_samples(processor, layout_of(job.skeleton.model), DTYPES[job.skeleton.dtype])
    fit_to = samples_wanted(job.skeleton.model, pick_device(job.device), None)
    samples = fitting_samples(job.origin.manifest.model.id, processed, asked.samples, tuple(judges), fit_to)
    free_memory()
    try:
        if samples:
            return _fitted(job, layers, asked, samples, processed, folder, progress)
        why = "every sample that there is judges"
    except Exception as error:
        if not isinstance(error, MachineError) and not is_out_of_memory(error):
            raise
        why = "memory does not suffice for the merged model in 16-bit beside its 4-bit form"
    finally:
        free_memory()
    return None, (NEAREST.format(why=why),)


def _changed_4bit(job: Job) -> frozenset[str]:
    """The layers of the merged checkpoint in 4-bit that the adapter changes."""
    changed = {name for name, pair in job.adapter.layers.items() if not pair.is_zero}
    return frozenset(x.name for x in as_merged(job.origin, job.skeleton).layers if x.is_four_bit) & changed


def fitting_samples(
    model_id: str, processed: ProcessedSamples, wanted: Wanted, judges: tuple[Sample, ...], fit_to: int = 0
) -> tuple[Sample, ...]:
    """Samples that are none of `judges`, see `fitted_codes`: as many as a scan takes by itself, so that few
    judges make no worse codes, or as judge if those are more; up to `fit_to` of those that bring answers.
    """
    asked, by_itself = (scan_count(model_id, x) for x in (wanted, replace(wanted, count=None)))
    count, sees = max(asked, by_itself), reads_images(processed.processor)
    most = max(count, fit_to)
    more = replace(wanted, count=len(judges) + most, bad_data="skip")
    builtin = Wanted(seed=wanted.seed, count=most, bad_data="skip")
    for one in (more, builtin):
        found = choose_samples(model_id, sees, one, "scan", processed.refusal).samples
        if left := independent_of(found, judges)[:most]:
            return (*left[:count], *(x for x in left[count:] if x.answer is not None))
    return ()


def _fitted(
    job: Job,
    layers: frozenset[str],
    asked: AskedCourse,
    samples: tuple[Sample, ...],
    processed: ProcessedSamples,
    folder: Path,
    progress: Progress,
) -> tuple[Path | None, tuple[str, ...]]:
    fmt, batching = job.origin.manifest.format, asked.batching
    subject, notes = merged_subject(job, layers, processed, samples, batching, folder)
    with subject.streaming():
        groups = subject.groups(_answered(subject, samples, batching), batching.size)
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
    return folder / run.codes.file, (told, *notes, *calibration_notes(run), *subject.halving.notes)


def _answered(subject: Subject, samples: Sequence[Sample], batching: Batching) -> tuple[Sample, ...]:
    """`samples`, those without an answer with the model's greedy one; without those that it gives none to."""
    own: dict[int, Sample] = {}
    for group in subject.groups(tuple(x for x in samples if x.answer is None), batching.size):
        with subject.running("answers", len(group)):
            found = answer_group(
                subject.model,
                subject.processed,
                group,
                batching.max_new_tokens,
                subject.halving,
                subject.reference.device,
            )
        own |= {id(given): mine for given, mine in zip(group, found, strict=True)}
    return tuple(x for x in (own.get(id(given), given) for given in samples) if x.answer)


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
