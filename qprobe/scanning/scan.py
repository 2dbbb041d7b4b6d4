"""The whole road of one scan: load, answer, measure, choose, write the manifest, draw."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from qprobe.calibration import calibrate as calibration
from qprobe.data.sampling import Wanted, choose_samples, split_held_out
from qprobe.errors import RunError, SampleError
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.reference import Reference, load_reference, reads_images
from qprobe.loading.spread import device_of
from qprobe.measure.ablation import ablated_layers, measure_ablation
from qprobe.measure.memory import peak_bytes
from qprobe.measure.nonfinite import first_finite, first_nonfinite
from qprobe.measure.runner import applicable_measures
from qprobe.measure.subject import Subject, limited_subject, subject_of
from qprobe.options import Progress, ScanOptions, no_progress
from qprobe.records import FormatSpec, Sample, Scan
from qprobe.registry.precisions import precision
from qprobe.report.write import write_report
from qprobe.runs.damaged import set_aside_damaged
from qprobe.runs.needed import Measures, units_left
from qprobe.runs.shards import SKIPLIST, entered, finishing, left_to_others, request_of
from qprobe.runs.store import open_run, read_scan, update_scan
from qprobe.runs.table import attribution_residual
from qprobe.scanning.answers import with_answers
from qprobe.scanning.check import check_inventory, check_model, check_options
from qprobe.scanning.choose import choose_list
from qprobe.scanning.findings import add_notes, write_findings
from qprobe.scanning.key import run_spec
from qprobe.scanning.measure import Work, cut_samples, measure_units
from qprobe.scanning.result import Clock, ScanResult
from qprobe.scanning.show import show_samples
from qprobe.scanning.weights import scan_weights
from qprobe.selection.budget import parse_size
from qprobe.system.processes import Shard, shard_from
from qprobe.system.wording import counted


@quiet_models()
def scan(options: ScanOptions, progress: Progress = no_progress) -> ScanResult:
    """Measure every linear of a model, choose a skip-list within the budget, and leave a run folder.

    A folder of the same specification is resumed: finished units are not measured again. Under torchrun, or
    wherever RANK and WORLD_SIZE are set, this process measures its share of the units (see
    `qprobe.runs.shards`), and whichever finds all of them finished goes on to choose.
    Raises QprobeError for anything a user can mend (see `qprobe.errors`).
    """
    check_options(options)
    limit = None if options.max_memory is None else parse_size(options.max_memory)
    if options.measures is not None and {*options.measures} == {"weight"}:
        return scan_weights(options, progress)
    shard = shard_from(os.environ)
    clock = Clock()
    with clock.stage("load"):
        folder = check_model(options, shard)  # whatever can be refused without weights
        reference = load_reference(
            options.model, device_of(shard, options.device), options.dtype, on_host=limit is not None
        )
    with clock.stage("weights"):
        subject = opened(reference, FormatSpec(options.format, compute_dtype=options.dtype), limit, folder)
        check_request(subject, options)
    with subject.streaming(), entered(folder, shard):
        with clock.stage("answers"):
            work = prepare_samples(subject, options, folder, progress, shard)
        with clock.stage("prepare"):
            with subject.running("start"):
                measures = start_run(subject, work, options, folder)
            show_samples(subject, work.calibration, folder)
        if precision(options.format).is_calibrated:
            with clock.stage("calibrate"):
                calibrate(subject, work, options, folder, progress, shard)
        with clock.stage("measure"):
            measure_units(subject, work, measures, folder, progress, shard)
        left = units_left(folder)
        with finishing(folder, shard, left, request_of(options)) as turn:
            if turn != "ours":
                return unfinished(subject, folder, work, clock, left_to_others(shard, turn, folder))
            return finish(subject, work, options, folder, clock, progress)


def opened(reference: Reference, fmt: FormatSpec, limit_bytes: int | None, folder: Path) -> Subject:
    """The subject of `reference`, within a limit if there is one."""
    if limit_bytes is None:
        return subject_of(reference, fmt)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return limited_subject(reference, fmt, limit_bytes, there)


def finish(
    subject: Subject, work: Work, options: ScanOptions, folder: Path, clock: Clock, progress: Progress
) -> ScanResult:
    """Everything after the units of the layer table: the table, ablation, choice and report."""
    with clock.stage("table"):
        write_findings(folder)
    if options.ablate is not None:
        with clock.stage("ablate"):
            layers = ablated_layers(options.ablate, folder)
            measure_ablation(subject, folder, work.calibration, layers, progress)
    with clock.stage("choose"):
        choice = choose_list(subject, folder, work.held_out, options, progress)
    peak = most_held(subject)
    # Before the report, which shows it, and again with the time that the report took.
    update_scan(folder, replace(read_scan(folder), status="finished", seconds=clock.seconds, peak_bytes=peak))
    with clock.stage("report"):
        write_report(folder)
    peak = most_held(subject)
    notes = () if subject.limit is None else subject.limit.note(peak)
    record = read_scan(folder)
    done = replace(record, seconds=clock.seconds, peak_bytes=peak, notes=(*record.notes, *notes))
    update_scan(folder, done)
    return ScanResult(
        run=folder,
        layers=len(done.inventory.layers),
        samples=work.samples,
        seconds=clock.seconds,
        peak_bytes=done.peak_bytes,
        kl_standard_4bit=choice.manifest.quality.kl_standard_4bit,
        kl_dynamic=choice.manifest.quality.kl_dynamic,
        attribution_residual=attribution_residual(folder),
        skiplist=folder / SKIPLIST,
        verdict=choice.verdict,
        notes=(*done.notes, *choice.notes),  # the run folder may be asked again, for another choice
        streamed_bytes=subject.streamed_bytes,
    )


def most_held(subject: Subject) -> int:
    """The peak of the fullest device, in bytes."""
    return max(peak_bytes(device) for device in subject.reference.devices)


def unfinished(subject: Subject, folder: Path, work: Work, clock: Clock, verdict: str) -> ScanResult:
    """The result of a process that leaves the choice to another one."""
    return ScanResult(
        run=folder,
        layers=len(subject.inventory.layers),
        samples=work.samples,
        seconds=clock.seconds,
        peak_bytes=most_held(subject),
        kl_standard_4bit=None,
        kl_dynamic=None,
        attribution_residual=None,
        skiplist=None,
        verdict=verdict,
        streamed_bytes=subject.streamed_bytes,
    )


def check_request(subject: Subject, options: ScanOptions) -> None:
    """Raises QprobeError, before anything is measured, for what this model can never be asked."""
    check_inventory(subject.inventory, subject.model, options)
    if precision(options.format).is_calibrated:
        calibration.check_limit(subject)


def prepare_samples(
    subject: Subject, options: ScanOptions, folder: Path, progress: Progress, shard: Shard
) -> Work:
    """The scan's samples with answers, split and cut into batches.

    Raises SampleError if no sample is usable.
    """
    wanted = Wanted(options.images, options.data, options.prompt, options.samples, options.seed)
    reference = subject.reference
    found = choose_samples(reference.identity.id, reads_images(reference), wanted, "scan")
    notes = list(found.skipped)
    samples = found.samples
    if subject.has_head:
        samples = with_answers(
            subject, samples, options.max_new_tokens, options.batch_size, folder, progress, shard
        )
        notes += why_silent(subject, tuple(s for s in samples if not s.answer))
        samples = tuple(s for s in samples if s.answer)
    if not samples:
        raise SampleError(
            f"None of the {counted(len(found.samples), 'sample')} has an answer to measure ({notes[-1]}). "
            "Pass other prompts, or another --dtype where values are not finite."
        )
    calibration, held_out = split_held_out(samples)
    if subject.has_head and not held_out:
        few = "1 sample is" if len(samples) == 1 else f"{len(samples)} samples are"
        notes.append(f"{few} too few to hold any out; the list is chosen by its score.")
    return cut_samples(subject, calibration, held_out, options.batch_size, tuple(notes))


def why_silent(subject: Subject, samples: tuple[Sample, ...]) -> list[str]:
    """For each sample that the model answers nothing to, why it is left out."""
    notes = []
    for sample in samples:
        with subject.running("finite"):
            layer = first_nonfinite(subject, (sample,))
        why = f"in 16-bit its values are not finite from {layer} on" if layer else "the model answers nothing"
        notes.append(f"{sample.id}: left out, {why}")
    return notes


def start_run(subject: Subject, work: Work, options: ScanOptions, folder: Path) -> Measures:
    """Open (or resume) the run folder; what can be measured on this model."""
    first = subject.encode(work.calibration[0])
    finite = first_finite(subject, work.calibration)
    wanted, notes = options.measures, work.notes
    if finite is None:
        wanted = tuple(m for m in wanted or ("sensitivity",) if m != "propagated")
        notes = (*notes, "Propagated error is not measured: on no sample is the 16-bit model finite.")
    batch = first if finite is None else subject.encode(finite)
    measures, more = applicable_measures(subject, batch, wanted, options.nodes)
    fmt = FormatSpec(options.format, compute_dtype=options.dtype)
    spec = run_spec(subject, fmt, measures, work.batches, first, options.seed)
    if fmt.is_calibrated:
        spec["rounding"] = calibration.SETTINGS
    identity = subject.reference.identity
    open_run(folder, Scan(identity, fmt, subject.inventory, spec, notes=(*notes, *more)))
    set_aside_damaged(folder)
    return measures


def calibrate(
    subject: Subject, work: Work, options: ScanOptions, folder: Path, progress: Progress, shard: Shard
) -> None:
    """Choose the codes of every 4-bit weight on the calibration samples, before its damage is measured.

    Raises RunError where several processes share a scan that is not calibrated yet.
    """
    if not shard.is_alone and read_scan(folder).codes is None:
        raise RunError(
            f"{folder} is not calibrated yet, and one process calibrates all weights: run the command "
            "without RANK and WORLD_SIZE, or share a scan of plain nf4."
        )
    calibration.calibrate_model(calibration.Work(subject, folder, work.calibration, progress=progress))
    add_notes(folder, (calibration.FITTED, *calibration.calibration_notes(folder)))
