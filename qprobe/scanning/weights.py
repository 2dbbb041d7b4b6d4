"""A scan of the weights alone: `qprobe scan --measures weight`, without loading the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from qprobe.errors import ModelError, QprobeError
from qprobe.formats.protocol import format_from
from qprobe.loading.device import DTYPES, pick_device
from qprobe.loading.mapped import return_freed_memory
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.source import Source
from qprobe.loading.spread import device_of
from qprobe.loading.stored import checkpoint_folder, weight_names
from qprobe.manifest.write import write_manifest
from qprobe.measure.files import file_rows, files_digest
from qprobe.measure.memory import peak_bytes
from qprobe.models.headers import StoredTensor, read_headers
from qprobe.options import DEFAULT_BUDGET, Progress, ScanOptions
from qprobe.records import FormatSpec, Inventory, ModelIdentity, Scan
from qprobe.report.write import write_report
from qprobe.runs.damaged import set_aside_damaged
from qprobe.runs.needed import units_left
from qprobe.runs.shards import SKIPLIST, entered, finishing, left_to_others, request_of
from qprobe.runs.store import missing_units, open_run, read_scan, update_scan, write_unit
from qprobe.scanning.check import check_model
from qprobe.scanning.choose import scan_command
from qprobe.scanning.findings import write_findings
from qprobe.scanning.result import Clock, ScanResult
from qprobe.selection.budget import parse_budget
from qprobe.selection.request import parse_request
from qprobe.selection.select import asked_skiplist, scored_run
from qprobe.selection.to_manifest import manifest_of
from qprobe.system.processes import Shard, shard_from
from qprobe.system.versions import library_versions
from qprobe.system.wording import counted, named

SCORE = "weight_nmse"
APPLIES = frozenset(("model", "budget", "out", "device", "dtype", "by", "for_tool", "measures"))
"""The fields of `ScanOptions` that bear on weights alone; any other is refused, new ones as well."""
CAUTION = (
    "Weight error hardly predicts what a layer's damage is: lists chosen by it come close to random ones. "
    "Where the model fits, scan without --measures weight."
)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files and its skeleton. weights: linear -> name of its weight, None if it is not stored."""

    source: Source
    folder: Path
    skeleton: Skeleton
    inventory: Inventory
    fmt: FormatSpec
    tensors: Mapping[str, StoredTensor]
    weights: Mapping[str, str | None]

    @property
    def by_file(self) -> dict[str, dict[str, str]]:
        """File -> linear -> name of the weight, files in the order of their names."""
        found: dict[str, dict[str, str]] = {}
        for layer, name in self.weights.items():
            if name is not None:
                found.setdefault(self.tensors[name].file, {})[layer] = name
        return dict(sorted(found.items()))

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(layer for layer, name in self.weights.items() if name is None)


def scan_weights(options: ScanOptions, progress: Progress) -> ScanResult:
    """Measure the weight error of every linear, one tensor at a time, and choose by it.

    A unit is one file of the checkpoint. Raises QprobeError for anything a user can mend.
    """
    return_freed_memory()
    shard = shard_from(os.environ)
    _check(options)
    device = pick_device(device_of(shard, options.device))
    clock = Clock()
    with clock.stage("load"):
        folder, skeleton = check_model(options, shard)  # before a checkpoint is fetched
        checkpoint = open_checkpoint(skeleton, options)
        parse_budget(options.budget or DEFAULT_BUDGET).within(checkpoint.inventory.standard_4bit_bytes)
        record = _record(checkpoint, device)
    with entered(folder, shard):
        open_run(folder, record)
        set_aside_damaged(folder)
        with clock.stage("weights"):
            measure_files(checkpoint, folder, device, shard, progress)
        left = units_left(folder)
        with finishing(folder, shard, left, request_of(options)) as turn:
            if turn == "ours":
                return _finish(options, folder, clock, device)
            verdict = left_to_others(shard, turn, folder)
    return _result(folder, len(record.inventory.layers), clock, device, None, verdict, ())


def _check(options: ScanOptions) -> None:
    """Raises QprobeError for what the weights alone cannot be asked."""
    for asked in fields(ScanOptions):
        if asked.name not in APPLIES and getattr(options, asked.name) != asked.default:
            option = f"--{asked.name.replace('_', '-')}"
            raise QprobeError(
                "--measures weight reads the files tensor by tensor and runs no samples, so "
                f"{option} does not apply. Leave one of them away."
            )
    if options.by not in (None, SCORE, "weight_peak"):
        raise QprobeError(f"--by {options.by} is not measured by --measures weight. Leave one of them away.")


def open_checkpoint(skeleton: Skeleton, options: ScanOptions) -> Checkpoint:
    """The files behind `skeleton`; no weight is read.

    Raises ModelError if they cannot be had, are in 4-bit already, or hold no linear's weight.
    """
    source, model = skeleton.source, skeleton.model
    fmt = FormatSpec(options.format, compute_dtype=options.dtype)
    folder = checkpoint_folder(source)
    tensors, inventory = read_headers(folder), skeleton.inventory(fmt)
    weights = weight_names(model, inventory, tensors)
    if not any(weights.values()):
        raise ModelError(
            f"{folder} holds none of the {len(weights)} linear layers of {skeleton.architecture} under a "
            "name that qprobe knows. Check that its config.json belongs to its safetensors files."
        )
    return Checkpoint(source, folder, skeleton, inventory, fmt, tensors, weights)


def _record(checkpoint: Checkpoint, device: torch.device) -> Scan:
    skeleton, source = checkpoint.skeleton, checkpoint.source
    identity = ModelIdentity(source.id, source.revision, skeleton.architecture, skeleton.fingerprint)
    where = [(file, name) for file, weights in checkpoint.by_file.items() for name in weights.values()]
    spec = {
        "model": asdict(identity),
        "weights": files_digest(checkpoint.folder, where),
        "files": list(checkpoint.by_file),
        "format": asdict(checkpoint.fmt),
        "device": device.type,
        "measures": {"weight": True},
        "versions": library_versions(),
    }
    missing = checkpoint.missing
    count = f"{counted(len(missing), 'linear')} {'is' if len(missing) == 1 else 'are'}"
    lost = (f"{count} not stored as one tensor and stay unmeasured: {named(missing)}.",) if missing else ()
    return Scan(
        identity, checkpoint.fmt, checkpoint.inventory, spec, unmeasured=missing, notes=(*lost, CAUTION)
    )


def measure_files(
    checkpoint: Checkpoint, folder: Path, device: torch.device, shard: Shard, progress: Progress
) -> None:
    """Run the missing ones of this process's units, one file of the checkpoint each."""
    files = list(checkpoint.by_file.items())
    fmt, dtype = format_from(checkpoint.fmt), DTYPES[checkpoint.fmt.compute_dtype]
    missing = shard.own(missing_units(folder, "weights", len(files)))
    for done, unit in enumerate(missing, start=1):
        file, weights = files[unit]
        write_unit(folder, "weights", unit, file_rows(checkpoint.folder / file, weights, fmt, device, dtype))
        progress("weights", done, len(missing))


def _finish(options: ScanOptions, folder: Path, clock: Clock, device: torch.device) -> ScanResult:
    """The table, the list chosen by it, and the pictures."""
    with clock.stage("choose"):
        write_findings(folder)
        request = parse_request(options.budget, None, options.by or SCORE, options.for_tool)
        run, record = scored_run(folder, request), read_scan(folder)
        skiplist, budget = asked_skiplist(run, request)
        command = scan_command(options, record.model.id)
        write_manifest(folder / SKIPLIST, manifest_of(run, skiplist, budget, command))
    done = replace(record, status="finished", seconds=clock.seconds, peak_bytes=peak_bytes(device))
    update_scan(folder, done)  # before the report, which shows it
    with clock.stage("report"):
        write_report(folder)
    update_scan(folder, replace(done, seconds=clock.seconds))
    verdict = f"No KL was measured; the list is chosen by {skiplist.by} alone."
    layers = len(record.inventory.layers)
    return _result(folder, layers, clock, device, folder / SKIPLIST, verdict, done.notes)


def _result(
    folder: Path,
    layers: int,
    clock: Clock,
    device: torch.device,
    skiplist: Path | None,
    verdict: str,
    notes: tuple[str, ...],
) -> ScanResult:
    return ScanResult(
        run=folder,
        layers=layers,
        samples=0,
        seconds=clock.seconds,
        peak_bytes=peak_bytes(device),
        kl_standard_4bit=None,
        kl_dynamic=None,
        attribution_residual=None,
        skiplist=skiplist,
        verdict=verdict,
        notes=notes,
    )
