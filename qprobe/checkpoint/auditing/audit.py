"""`qprobe audit`: what is really 4-bit in a checkpoint, from its config, headers and quantization states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qprobe.checkpoint.adapters.effect import adapter_effect, effect_problems
from qprobe.checkpoint.auditing.found import BROKEN, Audit, AuditedLayer, ReadEntry, State
from qprobe.checkpoint.auditing.loaded import loaded_problems
from qprobe.checkpoint.auditing.weights import uncalibrated, wrong_states
from qprobe.checkpoint.hub import fetched, manifest_in
from qprobe.errors import ModelError
from qprobe.exports.config_format import four_bit_format, has_four_bit_experts, is_four_bit, model_dtype
from qprobe.exports.languages import LIST_KEYS
from qprobe.exports.matchers import all_hits, hits, running_rule
from qprobe.loading.pretrained import incomplete, loading_info
from qprobe.loading.skeleton import Skeleton, skeleton_of
from qprobe.loading.source import resolve
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest
from qprobe.models.entry import whole_parts
from qprobe.models.headers import (
    INDEX,
    QUANT_STATE,
    SINGLE,
    StoredTensor,
    StoredWeight,
    read_config,
    read_headers,
    stored_parameter,
    stored_weight,
)
from qprobe.models.spellings import spellings
from qprobe.records import FormatSpec, Inventory, Linear
from qprobe.registry.precisions import absmax_bytes, packed_bytes
from qprobe.system.devices import parse_device
from qprobe.system.wording import counted, is_or_are

# Of a 4-bit weight: tables and metadata that bitsandbytes repeats for every layer, which no size here counts.
_TABLES = (".quant_map", ".nested_quant_map")
_PACKED_PARTS = (".absmax", ".nested_absmax", *_TABLES)
SIXTEEN_BIT = ("BF16", "F16", "F32")


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
    spec = _format(read_config(where), written)
    skeleton = skeleton_of(resolve(str(where), trust_remote_code), spec.compute_dtype)
    found = audit_files(where, skeleton, written, Path(manifest_folder or beside))
    if adapter is not None:
        layers = adapter_effect(where, Path(adapter), model, place, trust_remote_code, spec)
        found = replace(found, adapter=layers, problems=(*found.problems, *effect_problems(layers)))
    if not load:
        return found
    more = loaded_problems(skeleton, found.layers, written, place)
    return replace(found, problems=(*found.problems, *more), loaded=True)


def audit_files(where: Path, skeleton: Skeleton, written: Manifest | None, beside: Path) -> Audit:
    """What the files in `where` hold, without loading them. Errors as of `audit`.

    beside: the folder from which the manifest `written` names its calibrated weights.
    """
    config, tensors = read_config(where), read_headers(where)
    spec = _format(config, written)
    inventory = skeleton.inventory(spec)
    entries = _entries(config)
    read = None if entries is None else _read(entries, inventory)
    in_16bit = _in_16bit_class(skeleton.model, config, entries, inventory)
    weights = {x.name: _find(tensors, x, skeleton.architecture) for x in inventory.layers}
    layers = tuple(_audited(x, weights[x.name], x.name in in_16bit) for x in inventory.layers)
    problems = [*_broken(layers, config, read), *_dropped(inventory, in_16bit)]
    problems += _lacking(skeleton, inventory, weights, tensors)
    unlike = [*_wrong_codes(inventory, weights, spec)]
    packed = [(x, w) for x in inventory.layers if (w := weights[x.name]) is not None and w.four_bit]
    problems += unlike or wrong_states(where, tensors, packed, spec)
    parameter_bytes, total_bytes = _bytes(tensors, skeleton.model)
    if written is not None:
        problems += _against(written, skeleton.architecture, inventory, layers, total_bytes)
        problems += uncalibrated(where, tensors, weights, written, beside)
    return Audit(
        layers,
        read,
        parameter_bytes,
        total_bytes,
        tuple(problems),
        (*_remarks(read, layers, config), *_two_checkpoints(where)),
    )


def _format(config: Mapping[str, Any], manifest: Manifest | None) -> FormatSpec:
    """The format that the config names, or else the manifest's, or else the usual one."""
    quantization = _quantization(config)
    if quantization is None:
        return manifest.format if manifest is not None else FormatSpec()
    return four_bit_format(quantization, model_dtype(config))


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The bitsandbytes 4-bit config; None if there is no quantization. Raises ModelError for another."""
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ModelError("quantization_config in config.json is no JSON object; copy the checkpoint again.")
    method = found.get("quant_method", "bitsandbytes")
    if not is_four_bit(found):
        how = " without load_in_4bit" if method == "bitsandbytes" else ""
        raise ModelError(
            f"The checkpoint is quantized by {method!r}{how}; audit reads 4-bit checkpoints of bitsandbytes."
        )
    return found


def _entries(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    quantization = _quantization(config)
    found = None if quantization is None else quantization.get(LIST_KEYS[0])
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise ModelError(f"{LIST_KEYS[0]} in config.json is no list of names; write the list again.")
    return tuple(found)


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
    quantization = _quantization(config)
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


_WHAT = {
    "plain in a 4-bit class": (
        "{n} of {total} linears hold plain 16-bit data, but the config's list does not keep them, so they "
        "load as 4-bit layers without a quantization state and the first forward fails"
    ),
    "packed in a 16-bit class": (
        "{n} of {total} linears are packed 4-bit codes in the files, but {why}, so their codes would be read "
        "as weights"
    ),
    "missing": "{n} of {total} linears have no weight in the files",
}


def _broken(
    layers: Sequence[AuditedLayer], config: Mapping[str, Any], read: Sequence[ReadEntry] | None
) -> Iterator[str]:
    why = "the config's list keeps them in 16-bit" if read is not None else "the config says nothing of 4-bit"
    for state in BROKEN:
        names = [x.name for x in layers if x.state == state]
        if not names:
            continue
        dead = [x.entry for x in read or () if not x.layers]
        what = _WHAT[state].format(n=len(names), total=len(layers), why=why)
        hint = ""
        if state == "plain in a 4-bit class" and dead:
            hint = f"; entries that match nothing: {_some([repr(x) for x in dead])}"
        elif state == "plain in a 4-bit class" and read is None:
            hint = "; the config has no list at all"
        greedy = [x for x in read or () if x.too_many]
        if state == "packed in a 16-bit class" and greedy:
            hint = f"; the entry {greedy[0].entry!r} matches {counted(len(greedy[0].layers), 'layer')}"
        yield f"{what}: {_some(names)}{hint}."


def _lacking(
    skeleton: Skeleton,
    inventory: Inventory,
    weights: Mapping[str, StoredWeight | None],
    tensors: Mapping[str, StoredTensor],
) -> Iterator[str]:
    """Tensors that the files lack or hold in another shape, but for the linears, which others look at.

    transformers is asked about the tensors that packed weights stand for.
    """
    plain = {n: x for n, x in tensors.items() if QUANT_STATE not in n and not n.endswith(_PACKED_PARTS)}
    for layer in inventory.layers:
        if (weight := weights[layer.name]) is not None:
            plain[weight.name] = replace(weight.tensor, shape=layer.stored_shape)
    try:
        info = loading_info(skeleton, plain)
    except ModelError as error:
        yield str(error)
        return
    linears = {f"{x.name}.weight" for x in inventory.layers if x.experts is None}
    info["missing_keys"] = set(info["missing_keys"]) - linears
    yield from incomplete(skeleton.source, skeleton.model, info)


def _dropped(inventory: Inventory, in_16bit: frozenset[str]) -> Iterator[str]:
    """Defaults that the list replaced without naming them."""
    for layer in inventory.layers:
        if layer.fixed in ("tied", "lm_head") and layer.name not in in_16bit:
            what = "the output head" if layer.fixed == "lm_head" else "tied to the embedding"
            yield (
                f"The list does not name {layer.name}, {what}, which transformers keeps in 16-bit only where "
                f"there is no list; add it to {LIST_KEYS[0]}."
            )


def _wrong_codes(
    inventory: Inventory, weights: Mapping[str, StoredWeight | None], spec: FormatSpec
) -> Iterator[str]:
    """Packed layers whose codes are not those of the config, or of another shape."""
    wrong = []
    for layer in inventory.layers:
        weight = weights[layer.name]
        if weight is None:
            continue
        if weight.four_bit is None:
            if weight.tensor.shape != layer.stored_shape or weight.tensor.dtype not in SIXTEEN_BIT:
                wrong.append(
                    f"{layer.name} is {weight.tensor.dtype} of shape {list(weight.tensor.shape)}, not "
                    f"{list(layer.shape)} in 16-bit"
                )
        elif weight.four_bit != spec.quant_type:
            wrong.append(f"{layer.name} holds {weight.four_bit}, but the config says {spec.quant_type}")
        elif weight.tensor.nbytes != packed_bytes(layer.shape):
            wrong.append(
                f"{layer.name} has {weight.tensor.nbytes:,} bytes of codes, not {packed_bytes(layer.shape):,}"
            )
        elif weight.nested != spec.double_quant:
            wrong.append(
                f"{layer.name} was made {'with' if weight.nested else 'without'} double quantization, unlike "
                f"the config says"
            )
        elif 4 * weight.absmax != absmax_bytes(layer.shape, spec.blocksize, False):
            wrong.append(
                f"{layer.name} has {weight.absmax:,} block scales, not one for each {spec.blocksize}"
            )
    if wrong:
        yield (
            f"{counted(len(wrong), 'weight')} in the files {is_or_are(len(wrong))} not what the config says: "
            f"{_some(wrong, '; ')}."
        )


def _bytes(tensors: Mapping[str, StoredTensor], model: Any) -> tuple[int, int]:
    """(parameter bytes, bytes with block scales) of the files, without the tables that layers repeat.

    With what `model` computes itself and never saves, as Marian does its positions.
    """
    unsaved = set(model._keys_to_ignore_on_save or ()) - set(tensors)
    parameters = total = sum(x.nbytes for name, x in model.named_parameters() if name in unsaved)
    for name, tensor in tensors.items():
        if QUANT_STATE in name or name.endswith(_TABLES):
            continue
        total += tensor.nbytes
        parameters += 0 if name.endswith(_PACKED_PARTS) else tensor.nbytes
    return parameters, total


def _against(
    manifest: Manifest,
    architecture: str,
    inventory: Inventory,
    layers: Sequence[AuditedLayer],
    total_bytes: int,
) -> Iterator[str]:
    """Where files and manifest disagree."""
    strange = {(x.name, x.shape) for x in inventory.layers} ^ {(x.name, x.shape) for x in manifest.layers}
    if manifest.model.architecture != architecture or strange:
        name, shape = min(strange, default=("", ()))
        yield (
            f"The manifest was written for {manifest.model.id} ({manifest.model.architecture}, "
            f"{len(manifest.layers)} linears), but this is a {architecture} of {len(layers)}"
            + (f"; only one of them has {name} of shape {list(shape)}." if strange else ".")
        )
        return
    found = {x.name: x.state for x in layers}
    wanted = {x.name: x.is_four_bit for x in manifest.layers}
    packed = ("4-bit", "packed in a 16-bit class")
    is_4bit = [n for n, four_bit in wanted.items() if not four_bit and found[n] in packed]
    is_16bit = [n for n, four_bit in wanted.items() if four_bit and found[n] not in (*packed, "missing")]
    if is_4bit:
        yield (
            f"{counted(len(is_4bit), 'linear')} {is_or_are(len(is_4bit))} in 4-bit, though the manifest "
            f"keeps them: {_some(is_4bit)}."
        )
    if is_16bit:
        yield (
            f"{counted(len(is_16bit), 'linear')} {is_or_are(len(is_16bit))} in 16-bit, though the manifest "
            f"does not: {_some(is_16bit)}."
        )
    if not is_4bit and not is_16bit and total_bytes != manifest.budget.total_bytes:
        yield (
            f"The files hold {total_bytes:,} bytes, but the manifest expected "
            f"{manifest.budget.total_bytes:,}, though every linear has its precision; another tensor has "
            f"another dtype or is there twice."
        )


def _remarks(
    read: Sequence[ReadEntry] | None, layers: Sequence[AuditedLayer], config: Mapping[str, Any]
) -> Iterator[str]:
    if _quantization(config) is None and all(x.state in ("16-bit", "tied") for x in layers):
        yield "The checkpoint is not quantized: its config names no 4-bit and its files hold none."
    dead = [repr(x.entry) for x in read or () if not x.layers]
    if dead:
        yield (
            f"{len(dead)} of {len(read or ())} entries {'matches' if len(dead) == 1 else 'match'} no "
            f"linear: {_some(dead)}."
        )
    for entry in read or ():
        if entry.too_many:
            yield (
                f"The entry {entry.entry!r} matches {counted(len(entry.layers), 'linear')}, "
                f"{len(entry.too_many)} of these only as the ending of a name, such as {entry.too_many[0]}."
            )


def _two_checkpoints(folder: Path) -> Iterator[str]:
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        yield (
            f"The folder holds {SINGLE} and {INDEX}; transformers loads the first and ignores the other, "
            f"and so does this audit. Delete the one that is stale."
        )


def _some(names: Sequence[str], joint: str = ", ", shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return joint.join(names[:shown]) + more
