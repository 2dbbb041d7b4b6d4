"""The last step of a scan: tables, ablation, selection and report of a run whose units are all there."""

from __future__ import annotations

from collections.abc import Callable

from qprobe.measure.ablation import ablated_layers, measure_ablation
from qprobe.measure.memory import peak_bytes
from qprobe.measure.subject import Subject
from qprobe.report.write import write_report
from qprobe.runs.findings import write_findings
from qprobe.runs.layers.table import attribution_residual
from qprobe.runs.notes import Ended
from qprobe.runs.scored import Scored
from qprobe.runs.shards import SKIPLIST
from qprobe.runs.units import ablation_stage
from qprobe.scanning.asked.recorded import data_name
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.choose import HeldOut, Others, Scoring, choose
from qprobe.scanning.process import Clock, Process
from qprobe.scanning.run import ScanResult
from qprobe.scanning.samples import ScanSamples
from qprobe.selection.derived.ablated import write_ablation
from qprobe.selection.verdict import fewer_measured, metric_verdict


def finish(subject: Subject, work: ScanSamples, asked: ScanRequest, process: Process) -> ScanResult:
    """The result of the scan; writes its tables, its skip-list and its report."""
    run, clock = process.run, process.clock
    with clock.stage("table"):
        write_findings(run)
    if asked.ablate is not None:
        with clock.stage("ablate"):
            layers = ablated_layers(asked.ablate, run.scan, run.table)
            measure_ablation(subject, run, work.calibration, layers, process.progress)
            write_ablation(run, run.units(ablation_stage(frozenset(layers))), layers)
    with clock.stage("choose"):
        held_out = HeldOut(subject, run, work.held_out, process.progress)
        others = None if asked.others is None else Others(data_name(asked.others.data), work.others)
        selection = choose(held_out, asked.skiplist, asked.command, others)
    scored, verdict, unscored = None, selection.verdict, ()
    if asked.metric is not None:
        with clock.stage("metric"):
            scoring = Scoring(subject, work, asked.metric, asked.batching, process)
            scored, unscored = scoring.measure(selection.kept)
        if scored is not None:
            verdict = f"{verdict} {metric_verdict(scored)}"
    run.notes.add("memory", subject.halving.notes)
    left_out = () if work.share is None else (work.share,)
    fewer = fewer_measured(work.samples, work.silent, asked.samples.count)
    verdict = " ".join((verdict, *left_out, *fewer))
    report(process, lambda: ended(subject, clock, verdict, scored))
    quality = selection.manifest.quality
    return ScanResult(
        run=run.path,
        layers=len(run.key.inventory.layers),
        samples=work.samples,
        seconds=clock.seconds,
        peak_bytes=run.scan.peak_bytes,
        kl_standard_4bit=quality.kl_standard_4bit,
        kl_dynamic=quality.kl_dynamic,
        attribution_residual=attribution_residual(run),
        skiplist=run.path / SKIPLIST,
        verdict=verdict,
        # The run folder may be asked again, for another list.
        notes=(*run.notes.sentences, *selection.notes, *unscored),
        streamed_bytes=subject.streamed_bytes,
        metric=scored,
    )


def unfinished(subject: Subject, work: ScanSamples, process: Process, verdict: str) -> ScanResult:
    """The result of a process that leaves the selection to another one."""
    process.run.notes.add("memory", subject.halving.notes)
    return ScanResult(
        run=process.run.path,
        layers=len(subject.inventory.layers),
        samples=work.samples,
        seconds=process.clock.seconds,
        peak_bytes=most_held(subject),
        kl_standard_4bit=None,
        kl_dynamic=None,
        attribution_residual=None,
        skiplist=None,
        verdict=verdict,
        streamed_bytes=subject.streamed_bytes,
    )


def report(process: Process, until_now: Callable[[], Ended]) -> None:
    """Draw the pictures of the run, which then is finished. until_now: what the scan took."""
    run, clock = process.run, process.clock
    # Before the report, which shows it, and again with the time that the report took.
    run.notes.put("end", until_now())
    with clock.stage("report"):
        write_report(run)
    run.notes.put("end", until_now())


def ended(subject: Subject, clock: Clock, verdict: str, metric: Scored | None) -> Ended:
    """What the scan of `subject` found, and took until now."""
    peak = most_held(subject)
    notes = () if subject.limit is None else tuple(subject.limit.note(peak))
    return Ended(dict(clock.seconds), peak, notes, verdict, metric)


def most_held(subject: Subject) -> int:
    """The peak of the fullest device, in bytes."""
    return max(peak_bytes(device) for device in subject.reference.devices)
