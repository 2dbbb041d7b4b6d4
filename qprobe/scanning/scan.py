"""The whole road of one scan: load, answer, measure, choose, write the manifest, draw."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qprobe.calibration import calibrate as calibration
from qprobe.data.sampling import Wanted, choose_samples, split_held_out
from qprobe.errors import RunError, SampleError
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.reference import Reference, reference_of
from qprobe.loading.spread import device_of
from qprobe.measure.ablation import ablated_layers, measure_ablation
from qprobe.measure.memory import peak_bytes
from qprobe.measure.nonfinite import first_finite, first_nonfinite
from qprobe.measure.runner import applicable_measures
from qprobe.measure.subject import Subject, limited_subject, subject_of
from qprobe.options import Dtype, Progress, ScanOptions, no_progress, path_of
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
from qprobe.scanning.choose import HeldOut, choose, scan_command
from qprobe.scanning.findings import add_notes, write_findings
from qprobe.scanning.key import run_spec
from qprobe.scanning.measure import Work, cut_samples, measure_units
from qprobe.scanning.result import Clock, ScanResult
from qprobe.scanning.show import show_samples
from qprobe.scanning.weights import scan_weights
from qprobe.selection.budget import parse_size
from qprobe.selection.request import parse_request
from qprobe.system.processes import Shard, shard_from
from qprobe.system.wording import counted


@quiet_models()
def scan(
    model: str,
    *,
    images: str | Path | None = None,
    data: str | Path | None = None,
    prompt: str | None = None,
    samples: int | None = None,
    format: str = "nf4",
    budget: str | None = None,
    max_kl: float | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    dtype: Dtype = "bfloat16",
    seed: int = 0,
    batch_size: int = 4,
    max_new_tokens: int = 64,
    by: str | None = None,
    for_tool: str | None = None,
    measures: Sequence[str] | None = None,
    nodes: int = 2,
    ablate: str | int | None = None,
    max_memory: str | int | None = None,
    progress: Progress = no_progress,
) -> ScanResult:
    """What a scan found: it measures every linear, chooses a skip-list, and leaves a run folder.

    A folder of the same specification is resumed: finished units are not measured again. Under torchrun, or
    wherever RANK and WORLD_SIZE are set, this process measures its share of the units (see
    `qprobe.runs.shards`), and whichever finds all of them finished goes on to choose.

    model: catalogue alias, hub id or local folder.
    images: folder of images; data: JSON Lines file of samples; at most one of them, neither for the built-in
        ones. prompt: asked of every image of `images`. samples: how many; None for a sensible number.
    format: "nf4", or "nf4-calibrated" for codes that are chosen on the samples, at the same bytes.
    budget: what the skip-list may cost in bytes: "+10%" of standard 4-bit, "+690MiB", or a total "7.3GiB";
        None for "+10%". max_kl: ask the other way round, for the fewest bytes with a KL of at most this; at
        most one of the two.
    out: the run folder; None for runs/MODEL.
    device: "cpu", "cuda", "cuda:1", "auto" for all GPUs; None for the best one there is, or all GPUs where
        the model is too large for one. dtype: of the 16-bit reference.
    by: the score column that chooses; None for the best one measured.
    for_tool: one of `qprobe.options.FOR`, whose fused groups every list keeps whole; None for no tool.
    measures: which of `qprobe.registry.measures.names()` to take; None for all that apply. ["weight"] alone
        reads the checkpoint tensor by tensor and never loads the model. nodes: of the path attribution.
    ablate: measure the KL of single layers as well, two forward passes each: "all", the number of layers to
        take from the head of the sensitivity ranking, or names with commas between them.
    max_memory: the most that the scan may hold on its device, on a CPU in its process, in bytes or as
        "22GiB"; weights that do not fit wait on the host, for the same results. None for no limit.
    progress: called as work moves on, see `qprobe.options.Progress`.
    Raises QprobeError for anything a user can fix (see `qprobe.errors`).
    """
    return run_scan(
        ScanOptions(
            model=model,
            images=path_of(images),
            data=path_of(data),
            prompt=prompt,
            samples=samples,
            format=format,
            budget=budget,
            max_kl=max_kl,
            out=path_of(out),
            device=device,
            dtype=dtype,
            seed=seed,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            by=by,
            for_tool=for_tool,
            measures=None if measures is None else tuple(measures),
            nodes=nodes,
            ablate=None if ablate is None else str(ablate),
            max_memory=None if max_memory is None else str(max_memory),
        ),
        progress,
    )


def run_scan(options: ScanOptions, progress: Progress) -> ScanResult:
    """The whole road of `scan`."""
    check_options(options)
    limit = None if options.max_memory is None else parse_size(options.max_memory)
    if options.measures is not None and {*options.measures} == {"weight"}:
        return scan_weights(options, progress)
    shard = shard_from(os.environ)
    clock = Clock()
    with clock.stage("load"):
        folder, skeleton = check_model(options, shard)  # whatever can be refused without weights
        reference = reference_of(skeleton, device_of(shard, options.device), on_host=limit is not None)
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
        request = parse_request(options.budget, options.max_kl, options.by, options.for_tool)
        held_out = HeldOut(subject, folder, work.held_out, progress)
        selection = choose(held_out, request, scan_command(options, subject.reference.identity.id))
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
        kl_standard_4bit=selection.manifest.quality.kl_standard_4bit,
        kl_dynamic=selection.manifest.quality.kl_dynamic,
        attribution_residual=attribution_residual(folder),
        skiplist=folder / SKIPLIST,
        verdict=selection.verdict,
        notes=(*done.notes, *selection.notes),  # the run folder may be asked again, for another choice
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
    found = choose_samples(reference.identity.id, reference.reads_images, wanted, "scan")
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
