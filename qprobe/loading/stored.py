"""The weights of a model's linears where they lie in its files, found without loading the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qprobe.errors import ModelError
from qprobe.loading.names import checkpoint_names
from qprobe.loading.source import Source
from qprobe.models.headers import StoredTensor, read_headers, stored_weight
from qprobe.models.spellings import spellings
from qprobe.records import Inventory
from qprobe.system.wording import counted


def checkpoint_folder(source: Source) -> Path:
    """The folder with the files of `source`; from the hub, its safetensors and JSON files are fetched.

    Raises ModelError if they cannot be had.
    """
    if Path(source.location).is_dir():
        return Path(source.location)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            source.location, revision=source.revision, allow_patterns=["*.safetensors", "*.json"]
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"The files of {source.id!r} cannot be had: {first} Check the network, or pass a local folder."
        ) from error
    return Path(found)


def mixed_note(folder: Path, dtype: str) -> str | None:
    """What is said of a checkpoint in `folder` that is read in `dtype`, but stored in several, or in 8-bit.

    Of matrices and larger tensors: norms in float32 are usual. None where all are stored in one, or where
    there are no headers to read.
    """
    try:
        tensors = read_headers(folder).values()
    except ModelError:
        return None
    found = Counter(x.dtype for x in tensors if len(x.shape) > 1 and x.dtype.startswith(("F", "BF")))
    if len(found) < 2 and not any(x.startswith("F8") for x in found):
        return None
    kinds = ", ".join(f"{kind} ({counted(count, 'tensor')})" for kind, count in found.most_common())
    scaled = " 8-bit ones without the scales that may go with them." if any("F8" in x for x in found) else ""
    return f"The files hold matrices in {kinds}; all were read in {dtype}.{scaled}"


def cached_folder(source: Source) -> Path | None:
    """The folder with the files of `source`, from which it was loaded; None where they are not here."""
    if Path(source.location).is_dir():
        return Path(source.location)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.location, revision=source.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def weight_names(
    model: nn.Module, inventory: Inventory, tensors: Mapping[str, StoredTensor]
) -> dict[str, str | None]:
    """For each linear the name of its weight among `tensors`; None where the files have no such tensor.

    A tied weight is found under the name of the parameter that it shares, one that the files store split or
    merged, and those of experts, are not. Raises ModelError for a checkpoint that is in 4-bit already.
    """
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            shared.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    found, architecture = {}, type(model).__name__
    for layer in inventory.layers:
        if layer.experts is not None:  # files hold them under names of their own, or one by one
            found[layer.name] = None
            continue
        module = model.get_submodule(layer.name)
        others = tuple(n for n in shared.get(id(module.weight), []) if n != layer.name)
        in_files = {layer.name: layer.checkpoint_name, **checkpoint_names(model, others)}
        spelled = [
            n for name, saved in in_files.items() for n in reversed(spellings(name, saved, architecture).all)
        ]
        found[layer.name] = _first(tensors, spelled, layer.shape, getattr(model, "base_model_prefix", ""))
    return found


def _first(
    tensors: Mapping[str, StoredTensor], names: list[str], shape: tuple[int, ...], prefix: Any
) -> str | None:
    """The first of `names` that is stored; files of a bare model lack the prefix, those of others add it."""
    variants = [v for n in names for v in (n, f"{prefix}.{n}", n.removeprefix(f"{prefix}."))]
    for name in variants:
        weight = stored_weight(tensors, name)
        if weight is None:
            continue
        if weight.four_bit is not None:
            raise ModelError(
                f"{name} is in {weight.four_bit} already. Scan the 16-bit checkpoint that it came from."
            )
        if weight.tensor.shape == shape:
            return f"{name}.weight"
    return None
