"""The checking step of a scan: what is refused before weights are read, by the model's skeleton."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

from torch import nn

from qprobe.calibration.correction import FILE_NAME
from qprobe.data.sampling import check_wanted
from qprobe.errors import ModelError, RunError
from qprobe.inputs.drawing import refuse_undrawable
from qprobe.loading.inventory import refuse_rewriting
from qprobe.loading.loaded import loaded_skeleton
from qprobe.loading.pretrained import check_files
from qprobe.loading.skeleton import Skeleton, skeleton_of
from qprobe.measure.ablation import Ablated, check_ablated
from qprobe.measure.kl import readout_of, refuse_unread
from qprobe.records import FormatSpec, Inventory, ModelIdentity
from qprobe.runs.folder import RunFolder
from qprobe.runs.notes import CorrectionFile
from qprobe.runs.shards import entered
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.process import Process
from qprobe.selection.bound import SCORE, Bound
from qprobe.selection.request import ListRequest
from qprobe.selection.scores import ISOLATED_KL
from qprobe.system.processes import Shard


def check_model(asked: ScanRequest, process: Process) -> Skeleton:
    """The skeleton of the model, after what depends on it was checked.

    Raises QprobeError for a model that cannot be had or lacks a tensor, for samples, limits or layers that it
    does not have, and for a folder that cannot be its run folder, or keeps what would be replaced.
    """
    source, run, fmt = asked.source, process.run, asked.format
    check_wanted(source.id, asked.samples)
    if asked.loaded is None:
        skeleton = skeleton_of(source, fmt.compute_dtype)
    else:
        skeleton = loaded_skeleton(asked.loaded, fmt.compute_dtype)
    if skeleton.is_buildable:  # else loading says better what is wrong, and the same is checked then
        check_inventory(skeleton.inventory(fmt), skeleton.model, asked.skiplist, asked.ablate)
        if not asked.measures.is_weight_alone:
            refuse_unread(skeleton.model)
        if asked.drawn_texts:
            refuse_undrawable(skeleton.model)
    _check_folder(run.path, process.shard)
    if skeleton.is_buildable and run.is_there:
        identity = ModelIdentity(source.id, None, skeleton.architecture, skeleton.fingerprint)
        _check_same(run, identity, fmt)
        _refuse_to_replace(run, asked.keep_correction)
    if asked.loaded is None:
        check_files(skeleton)
    return skeleton


def check_inventory(
    inventory: Inventory, model: nn.Module, skiplist: ListRequest, ablate: Ablated | None
) -> None:
    """Raises QprobeError for what this model can never be asked. model: with or without its weights."""
    refuse_rewriting(model)
    if all(x.fixed for x in inventory.layers):
        why = f" ({inventory.uncovered[0].name}: {inventory.uncovered[0].why})" if inventory.uncovered else ""
        raise ModelError(
            f"{type(model).__name__} has no linear layer that transformers turns into 4-bit{why}, so there "
            "is nothing to choose. It stays in 16-bit as it is."
        )
    is_bound = isinstance(skiplist.limit, Bound)
    if not isinstance(skiplist.limit, Bound):
        skiplist.limit.within(inventory.standard_4bit_bytes)
    if ablate is not None:
        check_ablated(ablate, inventory)
    kl: dict[str, bool] = {
        "--ablate": ablate is not None,
        "--max-kl": is_bound,
        f"--by {skiplist.by}": skiplist.by in (SCORE, ISOLATED_KL),
    }
    asked = next((name for name, is_asked in kl.items() if is_asked), None)
    if asked is not None and readout_of(model) is None:
        raise ModelError(
            f"{type(model).__name__} has no language head, and its output is of no kind known here, so "
            f"there is no KL for {asked} to measure. Scan without {asked}."
        )


def _check_folder(folder: Path, shard: Shard) -> None:
    """Raises RunError if `folder` cannot be a run folder, or another process is at work in it.

    Makes nothing: a scan that is refused leaves no folder behind.
    """
    if folder.is_dir():
        with entered(folder, shard):
            return
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if there == folder.absolute():
        raise RunError(f"{folder} is a file, so it cannot be the run folder. Pass another --out.")
    try:  # rights alone do not tell: /proc refuses whoever has them all
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        why = f"cannot be written ({error.strerror})" if there.is_dir() else "is a file"
        raise RunError(f"{folder} cannot be written: {there} {why}. Pass another --out.") from error


def _check_same(run: RunFolder, model: ModelIdentity, fmt: FormatSpec) -> None:
    """Raises RunError if `run` holds a scan of another model or format."""
    identity = replace(model, revision=run.key.model.revision)  # the hub's is known once the model is loaded
    run.check_same(replace(run.key, model=identity, format=fmt))


def _refuse_to_replace(run: RunFolder, rank: int | None) -> None:
    """Raises RunError if `run` keeps a correction of its codes of another rank than `rank`, None for any.

    Adapters may have begun at it, and their trainings go on with no other.
    """
    noted: CorrectionFile | None = run.notes.get("correction")
    path = run.path / FILE_NAME
    if rank is None or noted is None or noted.rank == rank or not path.exists():
        return
    if run.codes is None or noted.codes != run.codes.sha256:
        return
    raise RunError(
        f"{path} is a correction of rank {noted.rank}, at which adapters may have begun, and "
        f"--keep-correction {rank} would replace it. Pass --keep-correction {noted.rank}, or move that file "
        "away first."
    )
