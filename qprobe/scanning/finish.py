"""The last step of a scan: tables, ablation, choice and report of a run whose units are all there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qprobe.measure.ablation import ablated_layers, measure_ablation
from qprobe.measure.memory import peak_bytes
from qprobe.measure.subject import Subject
from qprobe.records import Scan
from qprobe.report.write import write_report
from qprobe.runs.shards import SKIPLIST
from qprobe.runs.store import read_scan, update_scan
from qprobe.runs.table import attribution_residual
from qprobe.scanning.choose import HeldOut, choose
from qprobe.scanning.findings import add_notes, write_findings
from qprobe.scanning.process import Process
from qprobe.scanning.request import ScanRequest
from qprobe.scanning.result import ScanResult
from qprobe.scanning.samples import Work


def finish(subject: Subject, work: Work, asked: ScanRequest, process: Process) -> ScanResult:
    """The result of the scan; writes its tables, its skip-list and its report."""
    folder, clock = process.folder, process.clock
    with clock.stage("table"):
        write_findings(folder)
    if asked.ablate is not None:
        with clock.stage("ablate"):
            layers = ablated_layers(asked.ablate, folder)
            measure_ablation(subject, folder, work.calibration, layers, process.progress)
    with clock.stage("choose"):
        held_out = HeldOut(subject, folder, work.held_out, process.progress)
        selection = choose(held_out, asked.skiplist, asked.command)
    done = report(process, lambda: most_held(subject))
    if subject.limit is not None:
        add_notes(folder, subject.limit.note(most_held(subject)))
    quality = selection.manifest.quality
    return ScanResult(
        run=folder,
        layers=len(done.inventory.layers),
        samples=work.samples,
        seconds=clock.seconds,
        peak_bytes=done.peak_bytes,
        kl_standard_4bit=quality.kl_standard_4bit,
        kl_dynamic=quality.kl_dynamic,
        attribution_residual=attribution_residual(folder),
        skiplist=folder / SKIPLIST,
        verdict=selection.verdict,
        # The run folder may be asked again, for another list.
        notes=(*read_scan(folder).notes, *selection.notes),
        streamed_bytes=subject.streamed_bytes,
    )


def unfinished(subject: Subject, work: Work, process: Process, verdict: str) -> ScanResult:
    """The result of a process that leaves the choice to another one."""
    return ScanResult(
        run=process.folder,
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


def report(process: Process, held: Callable[[], int | None]) -> Scan:
    """The record of the run, finished, once its pictures are drawn. held: the most bytes held so far."""
    folder, clock = process.folder, process.clock
    # Before the report, which shows it, and again with the time that the report took.
    done = replace(read_scan(folder), status="finished", seconds=clock.seconds, peak_bytes=held())
    update_scan(folder, done)
    with clock.stage("report"):
        write_report(folder)
    done = replace(read_scan(folder), seconds=clock.seconds, peak_bytes=held())
    update_scan(folder, done)
    return done


def most_held(subject: Subject) -> int:
    """The peak of the fullest device, in bytes."""
    return max(peak_bytes(device) for device in subject.reference.devices)
