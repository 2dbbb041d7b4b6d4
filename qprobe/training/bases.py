"""The models an adapter can be put on, and the adapter of a finished run put on its base again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qprobe.checkpoint.load import check_model, proven_4bit, source_of, standard_4bit, with_dtype
from qprobe.checkpoint.ready import ready_for_training
from qprobe.loading.device import pick_device
from qprobe.loading.processor import load_processor
from qprobe.loading.reference import reference_of
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.source import known
from qprobe.loading.stored import checkpoint_folder
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest
from qprobe.measure.files import files_digest
from qprobe.models.headers import read_headers
from qprobe.options import Base
from qprobe.system.devices import AskedDevice, parse_device

MANIFEST_FILE = "skiplist.json"
BASE_WEIGHTS = "base_weights"  # key of the specification


def load_base(
    manifest: Path | Manifest,
    base: Base,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(model, processor): the manifest's model in 16-bit, in standard 4-bit or dynamic, ready for adapters.

    Errors as of `load_dynamic_4bit`; a model other than the manifest's is refused for each base.
    """
    asked, written = (
        parse_device(device),
        manifest if isinstance(manifest, Manifest) else read_manifest(manifest),
    )
    folder = None if isinstance(manifest, Manifest) else manifest.parent
    skeleton = check_model(written, model, trust_remote_code)
    loaded, processor = open_base(written, folder, base, skeleton, asked, dtype)
    return ready_for_training(loaded), processor


def open_base(
    manifest: Manifest,
    folder: Path | None,
    base: Base,
    skeleton: Skeleton,
    device: AskedDevice,
    dtype: str | None,
) -> tuple[Any, Any]:
    """`load_base` without what training needs: the model computes as it will be served.

    folder: where `manifest` lies. skeleton: of its model, checked.
    """
    if base == "dynamic":
        return proven_4bit(manifest, folder, skeleton, device, dtype)
    spec = with_dtype(manifest.format, dtype)
    wanted = skeleton.in_dtype(spec.compute_dtype)
    if base == "nf4":
        loaded = standard_4bit(wanted, replace(spec, name=spec.four_bit_name), device, None)
        return loaded, load_processor(wanted.source)
    one = parse_device(str(pick_device(device)))  # since a spread model does not train
    reference = reference_of(wanted, one)
    return reference.model, reference.processor


def model_folder(manifest: Manifest, model: str | None) -> str | None:
    """The folder on this machine that `model` (None for the manifest's) names; None for a name of the hub."""
    name = model or manifest.model.id
    folder = Path(source_of(manifest, model).location)
    return str(folder.resolve()) if known(name) is None and folder.is_dir() else None


def base_digest(manifest: Manifest, model: str | None) -> str:
    """SHA-256 over every tensor in the 16-bit files behind `model`, None for the manifest's.

    Of the files and not of the model as loaded, so that device and library versions do not enter.
    """
    folder = checkpoint_folder(source_of(manifest, model))
    tensors = sorted((n, t) for n, t in read_headers(folder).items() if t.elements and t.shape)
    return files_digest(folder, [(tensor.file, name) for name, tensor in tensors])
