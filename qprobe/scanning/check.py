"""What a scan is refused for before weights are read: by its options alone, then by the model's skeleton."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from qprobe.data.sampling import Wanted, check_wanted
from qprobe.errors import ModelError, QprobeError, RunError
from qprobe.loading.device import SPREAD, one_device, pick_device
from qprobe.loading.inventory import has_language_head
from qprobe.loading.skeleton import Skeleton, skeleton_of
from qprobe.loading.source import resolve
from qprobe.measure.ablation import ALL, ablated_names, check_ablated
from qprobe.options import ScanOptions
from qprobe.records import FormatSpec, Inventory, ModelIdentity
from qprobe.registry import measures as declared
from qprobe.runs.shards import entered
from qprobe.runs.store import differences, read_scan
from qprobe.selection.bound import SCORE, Bound
from qprobe.selection.budget import parse_size
from qprobe.selection.request import parse_request
from qprobe.selection.scores import ISOLATED_KL
from qprobe.system.processes import Shard


def check_options(options: ScanOptions) -> None:
    """Raises QprobeError for what no model can be asked: wrong words, and options that exclude each other."""
    _check_measures(options)
    _check_score(options)
    parse_request(options.budget, options.max_kl, options.by, options.for_tool)
    if options.max_memory is not None:
        parse_size(options.max_memory)
        if options.device == SPREAD:
            raise QprobeError(
                f"--max-memory keeps a scan to one GPU, and --device {SPREAD} takes all. Leave one away."
            )
    if options.ablate is not None:
        _check_ablate(options)
    pick_device(one_device(options.device))


def _check_measures(options: ScanOptions) -> None:
    asked = options.measures
    if asked is None:
        return
    unknown = [name for name in asked if name not in declared.names()]
    if unknown or not asked:
        what = f"names {unknown[0]!r}, which is no measure" if unknown else "names none"
        raise QprobeError(f"--measures {what}. Name one or more of {', '.join(declared.names())}.")
    if options.max_kl is not None and "sensitivity" not in asked:
        raise QprobeError(
            f"--max-kl chooses by sensitivity, which --measures {','.join(asked)} leaves out. Add it."
        )


def _check_score(options: ScanOptions) -> None:
    """Raises QprobeError if --by is no score, cannot choose, or is not going to be measured."""
    by, asked = options.by, options.measures
    if by is None:
        return
    adding_up = [x.name for x in declared.columns() if x.adds_up]
    measure = declared.measure_of(by)
    if measure is None:
        raise QprobeError(f"{by!r} is no measure. Choose by one of {', '.join(adding_up)}.")
    if by not in adding_up:
        raise QprobeError(
            f"{by} is in decibels, which do not add up. Choose by {by.replace('sqnr_db', 'nmse')}."
        )
    needed = measure.follows or measure.name
    if not measure.is_always and asked is not None and needed not in asked:
        raise QprobeError(f"--by {by} needs {needed}, which --measures {','.join(asked)} leaves out. Add it.")
    if "two nodes" in measure.needs and options.nodes < 2:
        raise QprobeError(f"--by {by} is measured at the first of two or more nodes. Pass --nodes 2.")


def _check_ablate(options: ScanOptions) -> None:
    asked, measures = str(options.ablate), options.measures
    names = ablated_names(asked)
    is_count = names is not None and not names
    if is_count and measures is not None and "sensitivity" not in measures:
        raise QprobeError(
            f"--ablate {asked} takes the most sensitive layers, and --measures {','.join(measures)} leaves "
            f"sensitivity out. Add it, or name the layers, or pass {ALL}."
        )


def check_model(options: ScanOptions, shard: Shard) -> tuple[Path, Skeleton]:
    """(run folder, skeleton) of the scan, after what depends on the skeleton was checked.

    Raises QprobeError for a model that cannot be had, for samples, limits or layers that it does not have,
    and for a folder that cannot be its run folder.
    """
    source = resolve(options.model)
    wanted = Wanted(options.images, options.data, options.prompt, options.samples, options.seed)
    check_wanted(source.id, wanted)
    folder = options.out or Path("runs") / source.id.replace("/", "--")
    fmt = FormatSpec(options.format, compute_dtype=options.dtype)
    skeleton = skeleton_of(source, options.dtype)
    if skeleton.is_buildable:  # else loading says better what is wrong, and the same is checked then
        check_inventory(skeleton.inventory(fmt), skeleton.model, options)
    _check_folder(folder, shard)
    if skeleton.is_buildable and (folder / "scan.json").is_file():
        identity = ModelIdentity(source.id, None, skeleton.architecture, skeleton.fingerprint)
        _check_same(folder, identity, fmt)
    return folder, skeleton


def check_inventory(inventory: Inventory, model: nn.Module, options: ScanOptions) -> None:
    """Raises QprobeError for what this model can never be asked. model: with or without its weights."""
    limit = parse_request(options.budget, options.max_kl, options.by, options.for_tool).limit
    if not isinstance(limit, Bound):
        limit.within(inventory.standard_4bit_bytes)
    if options.ablate is not None:
        check_ablated(options.ablate, inventory)
    kl: dict[str, bool] = {
        "--ablate": options.ablate is not None,
        "--max-kl": options.max_kl is not None,
        f"--by {options.by}": options.by in (SCORE, ISOLATED_KL),
    }
    asked = next((name for name, is_asked in kl.items() if is_asked), None)
    if asked is not None and not has_language_head(model):
        raise ModelError(
            f"{type(model).__name__} has no language head, so there is no KL for {asked} "
            f"to measure. Scan without {asked}."
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
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written" if there.is_dir() else "is a file"
        raise RunError(f"{folder} cannot be written: {there} {why}. Pass another --out.")


def _check_same(folder: Path, model: ModelIdentity, fmt: FormatSpec) -> None:
    """Raises RunError if `folder` holds a scan of another model or format."""
    record = read_scan(folder)
    identity = replace(model, revision=record.model.revision)  # the hub's is known once the model is loaded
    spec = {**record.spec, "model": asdict(identity), "format": asdict(fmt)}
    found = differences(record, replace(record, model=identity, format=fmt, spec=spec))
    if found:
        raise RunError(f"{folder} holds another scan, which differs in {found}. Pass another --out.")
