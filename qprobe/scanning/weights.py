"""A scan of the weights alone: `qprobe scan --measures weight`, without loading the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from qprobe.errors import ModelError
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
from qprobe.records import FormatSpec, Inventory, ModelIdentity, Scan
from qprobe.runs.damaged import set_aside_damaged
from qprobe.runs.needed import units_left
from qprobe.runs.shards import SKIPLIST, entered, finishing, left_to_others
from qprobe.runs.store import missing_units, open_run, write_unit
from qprobe.scanning.check import check_inventory, check_model
from qprobe.scanning.findings import write_findings
from qprobe.scanning.finish import report
from qprobe.scanning.process import Process
from qprobe.scanning.request import ScanRequest
from qprobe.scanning.result import ScanResult
from qprobe.selection.outcome import by_score
from qprobe.selection.select import scored_run
from qprobe.selection.to_manifest import manifest_of
from qprobe.system.versions import library_versions
from qprobe.system.wording import counted, named

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


def scan_weights(asked: ScanRequest, process: Process) -> ScanResult:
    """The result of a scan that reads one tensor at a time, and chooses by the weight error of every linear.

    A unit is one file of the checkpoint. Raises QprobeError for anything a user can fix.
    """
    return_freed_memory()
    folder, shard, clock = process.folder, process.shard, process.clock
    device = pick_device(device_of(shard, asked.device))
    with clock.stage("load"):
        skeleton = check_model(asked, shard)  # before a checkpoint is fetched
        checkpoint = open_checkpoint(skeleton, asked.format)
        check_inventory(checkpoint.inventory, skeleton.model, asked.skiplist, asked.ablate)
        record = _record(checkpoint, device)
    with entered(folder, shard):
        open_run(folder, record)
        set_aside_damaged(folder)
        with clock.stage("weights"):
            measure_files(checkpoint, device, process)
        with finishing(folder, shard, units_left(folder), asked.after_units) as turn:
            if turn == "ours":
                return _finish(asked, process, device)
            verdict = left_to_others(shard, turn, folder)
    return _result(process, record, peak_bytes(device), verdict)


def open_checkpoint(skeleton: Skeleton, fmt: FormatSpec) -> Checkpoint:
    """The files behind `skeleton`; no weight is read.

    Raises ModelError if they cannot be had, are in 4-bit already, or hold no linear's weight.
    """
    source, model = skeleton.source, skeleton.model
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


def measure_files(checkpoint: Checkpoint, device: torch.device, process: Process) -> None:
    """Run the missing ones of this process's units, one file of the checkpoint each."""
    files = list(checkpoint.by_file.items())
    fmt, dtype = format_from(checkpoint.fmt), DTYPES[checkpoint.fmt.compute_dtype]
    folder = process.folder
    missing = process.shard.own(missing_units(folder, "weights", len(files)))
    for done, unit in enumerate(missing, start=1):
        file, weights = files[unit]
        write_unit(folder, "weights", unit, file_rows(checkpoint.folder / file, weights, fmt, device, dtype))
        process.progress("weights", done, len(missing))


def _finish(asked: ScanRequest, process: Process, device: torch.device) -> ScanResult:
    """The table, the list chosen by it, and the pictures."""
    folder = process.folder
    with process.clock.stage("choose"):
        write_findings(folder)
        run = scored_run(folder, asked.skiplist)
        outcome = by_score(run, asked.skiplist)
        manifest = manifest_of(run, outcome.skiplist, outcome.budget, asked.command)
        write_manifest(folder / SKIPLIST, manifest)
    done = report(process, lambda: peak_bytes(device))
    result = _result(process, done, done.peak_bytes, outcome.verdict)
    return replace(result, skiplist=folder / SKIPLIST, notes=done.notes)


def _result(process: Process, record: Scan, peak: int | None, verdict: str) -> ScanResult:
    """The result of a process, without a skip-list."""
    return ScanResult(
        run=process.folder,
        layers=len(record.inventory.layers),
        samples=0,
        seconds=process.clock.seconds,
        peak_bytes=peak,
        kl_standard_4bit=None,
        kl_dynamic=None,
        attribution_residual=None,
        skiplist=None,
        verdict=verdict,
    )
