"""`qprobe audit`: what is really 4-bit in a checkpoint, from its config, headers and quantization states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qprobe.checkpoint.adapters.effect import adapter_effect, effect_problems, effect_remarks
from qprobe.checkpoint.auditing.config import entries_of, format_of, quantization_of
from qprobe.checkpoint.auditing.found import Audit, AuditedLayer, ReadEntry, State
from qprobe.checkpoint.auditing.loaded import loaded_problems
from qprobe.checkpoint.auditing.problems import (
    PACKED_PARTS,
    TABLES,
    against,
    broken,
    dropped,
    lacking,
    remarks,
    two_checkpoints,
    wrong_codes,
)
from qprobe.checkpoint.auditing.weights import uncalibrated, wrong_states
from qprobe.checkpoint.hub import fetched, manifest_in
from qprobe.exports.config_format import has_four_bit_experts
from qprobe.exports.matchers import all_hits, hits, running_rule
from qprobe.loading.skeleton import Skeleton, skeleton_of
from qprobe.loading.source import resolve
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest
from qprobe.models.entry import whole_parts
from qprobe.models.headers import (
    QUANT_STATE,
    StoredTensor,
    StoredWeight,
    read_config,
    read_headers,
    stored_parameter,
    stored_weight,
)
from qprobe.models.spellings import spellings
from qprobe.records import Inventory, Linear
from qprobe.system.devices import parse_device


def audit(
    folder: Path | str,
    manifest: Manifest | str | Path | None = None,
    load: bool = False,
    device: str | None = None,
    manifest_folder: Path | str | None = None,
    adapter: Path | str | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    allow_downloads: bool = False,
) -> Audit:
    """What the checkpoint in `folder` holds, and whether its config, its files and `manifest` agree.

    folder, manifest: also hub ids; a manifest may be the folder that holds it. allow_downloads: fetch what
    the hub's cache lacks of them.
    load: load it too, plainly, as a user would, and look at every layer; device: where to.
    manifest_folder: where the manifest lies, from which it names its calibrated weights; None for that of
    the file `manifest`, or the working directory. adapter: folder of one that was merged into the checkpoint;
    of each of its layers is said whether it took effect. model: where the 16-bit weights of the adapter's
    base are; None for the model that it names. trust_remote_code: as of `load_dynamic_4bit`.
    Raises ModelError for a folder that is not a complete checkpoint, ManifestError for a broken manifest.
    """
    where, place = fetched(folder, allow_downloads), parse_device(device)
    if isinstance(manifest, Manifest) or manifest is None:
        written, beside = manifest, Path(".")
    else:
        path = manifest_in(manifest, allow_downloads)
        written, beside = read_manifest(path), path.parent
    spec = format_of(read_config(where), written)
    skeleton = skeleton_of(resolve(str(where), trust_remote_code), spec.compute_dtype)
    found = audit_files(where, skeleton, written, Path(manifest_folder or beside))
    if adapter is not None:
        layers = adapter_effect(where, Path(adapter), model, place, trust_remote_code, spec)
        found = replace(
            found,
            adapter=layers,
            problems=(*found.problems, *effect_problems(layers)),
            remarks=(*found.remarks, *effect_remarks(layers)),
        )
    if not load:
        return found
    more = loaded_problems(skeleton, found.layers, written, place)
    return replace(found, problems=(*found.problems, *more), loaded=True)


def audit_files(where: Path, skeleton: Skeleton, written: Manifest | None, beside: Path) -> Audit:
    """What the files in `where` hold, without loading them. Errors as of `audit`.

    beside: the folder from which the manifest `written` names its calibrated weights.
    """
    config, tensors = read_config(where), read_headers(where)
    spec = format_of(config, written)
    inventory = skeleton.inventory(spec)
    entries = entries_of(config)
    read = None if entries is None else _read(entries, inventory)
    in_16bit = _in_16bit_class(skeleton.model, config, entries, inventory)
    weights = {x.name: _find(tensors, x, skeleton.architecture) for x in inventory.layers}
    layers = tuple(_audited(x, weights[x.name], x.name in in_16bit) for x in inventory.layers)
    problems = [*broken(layers, config, read), *dropped(inventory, in_16bit)]
    problems += lacking(skeleton, inventory, weights, tensors)
    unlike = [*wrong_codes(inventory, weights, spec)]
    packed = [(x, w) for x in inventory.layers if (w := weights[x.name]) is not None and w.four_bit]
    problems += unlike or wrong_states(where, tensors, packed, spec)
    parameter_bytes, total_bytes = _bytes(tensors, skeleton.model)
    if written is not None:
        problems += against(written, skeleton.architecture, inventory, layers, total_bytes)
        problems += uncalibrated(where, tensors, weights, written, beside)
    return Audit(
        layers,
        read,
        parameter_bytes,
        total_bytes,
        tuple(problems),
        (*remarks(read, layers, config), *two_checkpoints(where)),
    )


def _read(entries: Sequence[str], inventory: Inventory) -> tuple[ReadEntry, ...]:
    """What the running transformers makes of each entry, and what lies beyond the entry's own words."""
    found, names = [], [x.name for x in inventory.layers]
    for entry, layers in zip(entries, all_hits(running_rule(), entries, names), strict=True):
        is_name = all(c.isalnum() or c in "._-" for c in entry)
        extra = tuple(name for name in layers if is_name and not whole_parts(entry, name))
        found.append(ReadEntry(entry, layers, extra))
    return tuple(found)


def _in_16bit_class(
    model: Any, config: Mapping[str, Any], entries: Sequence[str] | None, inventory: Inventory
) -> frozenset[str]:
    """The linears that stay plain `nn.Linear` when transformers loads this config."""
    names = [x.name for x in inventory.layers if x.experts is None]
    experts = frozenset(x.name for x in inventory.layers if x.experts is not None)
    quantization = quantization_of(config)
    if quantization is None:
        return experts.union(names)
    if entries is None:
        from transformers.quantizers.base import get_keys_to_not_convert

        entries = get_keys_to_not_convert(model)
    rule = running_rule()
    keys = [*entries, *sorted(getattr(model, "_keep_in_fp32_modules", None) or ())]
    kept = frozenset(name for key in keys for name in hits(rule, key, names))
    return kept if has_four_bit_experts(quantization) else kept | experts


def _find(tensors: Mapping[str, StoredTensor], layer: Linear, architecture: str) -> StoredWeight | None:
    """The layer's weight under whichever of its names the files use.

    Files hold experts in 16-bit one by one, or fused in ways of their own: only packed ones are looked for.
    """
    if layer.experts is not None:
        found = stored_parameter(tensors, layer.name)
        return found if found is not None and found.four_bit is not None else None
    for name in reversed(spellings(layer.name, layer.checkpoint_name, architecture).all):
        found = stored_weight(tensors, name)
        if found is not None:
            return found
    return None


def _audited(layer: Linear, weight: StoredWeight | None, is_16bit_class: bool) -> AuditedLayer:
    if weight is None and layer.experts is not None:
        return AuditedLayer(layer.name, "16-bit", None)
    if weight is None:
        return AuditedLayer(layer.name, "tied" if layer.fixed == "tied" else "missing", None)
    state: State = "4-bit"
    if weight.four_bit is None:
        state = "16-bit" if is_16bit_class else "plain in a 4-bit class"
    elif is_16bit_class:
        state = "packed in a 16-bit class"
    return AuditedLayer(layer.name, state, weight.tensor.file)


def _bytes(tensors: Mapping[str, StoredTensor], model: Any) -> tuple[int, int]:
    """(parameter bytes, bytes with block scales) of the files, without the tables that layers repeat.

    With what `model` computes itself and never saves, as Marian does its positions.
    """
    unsaved = set(model._keys_to_ignore_on_save or ()) - set(tensors)
    parameters = total = sum(x.nbytes for name, x in model.named_parameters() if name in unsaved)
    for name, tensor in tensors.items():
        if QUANT_STATE in name or name.endswith(TABLES):
            continue
        total += tensor.nbytes
        parameters += 0 if name.endswith(PACKED_PARTS) else tensor.nbytes
    return parameters, total
