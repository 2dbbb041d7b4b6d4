"""A scan of the weights alone: `qprobe scan --measures weight`, without loading the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qprobe.formats.protocol import format_from
from qprobe.loading.device import DTYPES, pick_device
from qprobe.loading.experts.stored import StoredExperts, stored_experts
from qprobe.loading.mapped import return_freed_memory
from qprobe.loading.pretrained import check_folder
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.source import Source
from qprobe.loading.spread import device_of
from qprobe.loading.stored import checkpoint_folder, weight_names
from qprobe.manifest.write import write_manifest
from qprobe.measure.files import expert_rows, file_rows, files_digest
from qprobe.measure.memory import peak_bytes
from qprobe.measure.weights import weight_frame
from qprobe.models.headers import StoredTensor, read_headers
from qprobe.records import FormatSpec, Inventory, ModelIdentity
from qprobe.runs.damaged import set_aside_damaged
from qprobe.runs.findings import write_findings
from qprobe.runs.key import VERSION, Key, Spec
from qprobe.runs.notes import Ended, Ran
from qprobe.runs.shards import SKIPLIST, entered, finishing, left_to_others
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.check import check_inventory, check_model
from qprobe.scanning.finish import report
from qprobe.scanning.process import Process
from qprobe.scanning.run import ScanResult
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
    """A model's files and its skeleton.

    weights: linear -> name of its weight, None if it is not stored. experts: the fused weights that are.
    """

    source: Source
    folder: Path
    skeleton: Skeleton
    inventory: Inventory
    fmt: FormatSpec
    tensors: Mapping[str, StoredTensor]
    weights: Mapping[str, str | None]
    experts: Mapping[str, StoredExperts]

    @property
    def files(self) -> tuple[str, ...]:
        """Those in which a measured weight begins, in the order of their names."""
        return tuple(sorted({*self.by_file, *(self.file_of(x) for x in self.experts.values())}))

    def file_of(self, weight: StoredExperts) -> str:
        """The file in which `weight` begins; its pieces may lie in several."""
        return self.tensors[weight.tensors[0]].file

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
        return tuple(x for x, name in self.weights.items() if name is None and x not in self.experts)


def scan_weights(asked: ScanRequest, process: Process) -> ScanResult:
    """The result of a scan that reads one tensor at a time, and chooses by the weight error of every linear.

    A unit is one file of the checkpoint. Raises QprobeError for anything a user can fix.
    """
    return_freed_memory()
    run, shard, clock = process.run, process.shard, process.clock
    device = pick_device(device_of(shard, asked.device))
    checkpoint, key = open_weights(asked, process, device)
    with entered(run.path, shard):
        run.open(key)
        run.notes.put("layers", _unmeasured(checkpoint.missing))
        run.notes.add("start", (CAUTION,))
        set_aside_damaged(run)
        with clock.stage("weights"):
            measure_files(checkpoint, device, process)
        with finishing(run.path, shard, run.units_left, asked.after_units) as turn:
            if turn == "ours":
                return _finish(asked, process, device)
            verdict = left_to_others(shard, turn, run)
    return _result(process, peak_bytes(device), verdict)


def open_weights(asked: ScanRequest, process: Process, device: torch.device) -> tuple[Checkpoint, Key]:
    """The files that the scan reads, and the key of its run; raises QprobeError for what cannot be asked."""
    with process.clock.stage("load"):
        skeleton = check_model(asked, process)  # before a checkpoint is fetched
        checkpoint = open_checkpoint(skeleton, asked.format)
        check_inventory(checkpoint.inventory, skeleton.model, asked.skiplist, asked.ablate)
        return checkpoint, _run_key(checkpoint, device)


def open_checkpoint(skeleton: Skeleton, fmt: FormatSpec) -> Checkpoint:
    """The files behind `skeleton`; no weight is read.

    Raises ModelError if they cannot be had, are in 4-bit already, or lack a tensor.
    """
    source, model = skeleton.source, skeleton.model
    folder = checkpoint_folder(source)
    check_folder(skeleton, folder)
    tensors, inventory = read_headers(folder), skeleton.inventory(fmt)
    weights = weight_names(model, inventory, tensors)
    experts = stored_experts(model, [x.name for x in inventory.layers if x.experts], tensors)
    return Checkpoint(source, folder, skeleton, inventory, fmt, tensors, weights, experts)


def _run_key(checkpoint: Checkpoint, device: torch.device) -> Key:
    skeleton, source = checkpoint.skeleton, checkpoint.source
    identity = ModelIdentity(source.id, source.revision, skeleton.architecture, skeleton.fingerprint)
    where = [(file, name) for file, weights in checkpoint.by_file.items() for name in weights.values()]
    pieces = [name for weight in checkpoint.experts.values() for name in weight.tensors]
    where += [(checkpoint.tensors[name].file, name) for name in pieces]
    spec = Spec(
        weights=files_digest(checkpoint.folder, where),
        files=checkpoint.files,
        device=device.type,
        versions=library_versions(),
    )
    return Key(VERSION, identity, checkpoint.fmt, checkpoint.inventory, spec)


def _unmeasured(missing: tuple[str, ...]) -> Ran:
    count = f"{counted(len(missing), 'linear')} {'is' if len(missing) == 1 else 'are'}"
    lost = (f"{count} not stored as one tensor and stay unmeasured: {named(missing)}.",) if missing else ()
    return Ran(missing, lost)


def measure_files(checkpoint: Checkpoint, device: torch.device, process: Process) -> None:
    """Run the missing ones of this process's units, one file of the checkpoint each."""
    files, linears, folder = checkpoint.files, checkpoint.by_file, checkpoint.folder
    fmt, dtype = format_from(checkpoint.fmt), DTYPES[checkpoint.fmt.compute_dtype]
    run = process.run
    missing = process.shard.own(run.missing_units("weights", len(files)))
    for done, unit in enumerate(missing, start=1):
        rows = file_rows(folder / files[unit], linears.get(files[unit], {}), fmt, device, dtype)
        for weight in checkpoint.experts.values():
            if checkpoint.file_of(weight) == files[unit]:
                pieces = {name: folder / checkpoint.tensors[name].file for name in weight.tensors}
                rows += expert_rows(weight, pieces, fmt, device, dtype)
        run.write_unit("weights", unit, weight_frame(rows))
        process.progress("weights", done, len(missing))


def _finish(asked: ScanRequest, process: Process, device: torch.device) -> ScanResult:
    """The table, the list chosen by it, and the pictures."""
    run = process.run
    with process.clock.stage("choose"):
        write_findings(run)
        scored = scored_run(run, asked.skiplist)
        outcome = by_score(scored, asked.skiplist)
        manifest = manifest_of(scored, outcome.skiplist, outcome.budget, asked.command)
        write_manifest(run.path / SKIPLIST, manifest)
        run.files.record(SKIPLIST, len(manifest.layers))
    report(process, lambda: Ended(dict(process.clock.seconds), peak_bytes(device), (), outcome.verdict))
    result = _result(process, peak_bytes(device), outcome.verdict)
    return replace(result, skiplist=run.path / SKIPLIST, notes=run.notes.sentences)


def _result(process: Process, peak: int | None, verdict: str) -> ScanResult:
    """The result of a process, without a skip-list."""
    return ScanResult(
        run=process.run.path,
        layers=len(process.run.key.inventory.layers),
        samples=0,
        seconds=process.clock.seconds,
        peak_bytes=peak,
        kl_standard_4bit=None,
        kl_dynamic=None,
        attribution_residual=None,
        skiplist=None,
        verdict=verdict,
    )
