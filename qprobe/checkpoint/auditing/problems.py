"""What disagrees in a checkpoint, a sentence each: files, config, list and manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qprobe.checkpoint.auditing.config import quantization_of
from qprobe.checkpoint.auditing.found import BROKEN, AuditedLayer, ReadEntry
from qprobe.errors import ModelError
from qprobe.exports.languages import LIST_KEYS
from qprobe.loading.pretrained import incomplete, loading_info
from qprobe.loading.skeleton import Skeleton
from qprobe.manifest.records import Manifest
from qprobe.models.headers import (
    INDEX,
    QUANT_STATE,
    SINGLE,
    StoredTensor,
    StoredWeight,
)
from qprobe.records import FormatSpec, Inventory
from qprobe.registry.precisions import absmax_bytes, packed_bytes
from qprobe.system.wording import counted, is_or_are

# Of a 4-bit weight: tables and metadata that bitsandbytes repeats for every layer, which no size counts.
TABLES = (".quant_map", ".nested_quant_map")
PACKED_PARTS = (".absmax", ".nested_absmax", *TABLES)
SIXTEEN_BIT = ("BF16", "F16", "F32")


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


def broken(
    layers: Sequence[AuditedLayer], config: Mapping[str, Any], read: Sequence[ReadEntry] | None
) -> Iterator[str]:
    """Linears that cannot be read as their class would: one sentence for each state of `BROKEN`."""
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


def lacking(
    skeleton: Skeleton,
    inventory: Inventory,
    weights: Mapping[str, StoredWeight | None],
    tensors: Mapping[str, StoredTensor],
) -> Iterator[str]:
    """Tensors that the files lack or hold in another shape, but for the linears, which others look at.

    transformers is asked about the tensors that packed weights stand for.
    """
    plain = {n: x for n, x in tensors.items() if QUANT_STATE not in n and not n.endswith(PACKED_PARTS)}
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


def dropped(inventory: Inventory, in_16bit: frozenset[str]) -> Iterator[str]:
    """Defaults that the list replaced without naming them."""
    for layer in inventory.layers:
        if layer.fixed in ("tied", "lm_head") and layer.name not in in_16bit:
            what = "the output head" if layer.fixed == "lm_head" else "tied to the embedding"
            yield (
                f"The list does not name {layer.name}, {what}, which transformers keeps in 16-bit only where "
                f"there is no list; add it to {LIST_KEYS[0]}."
            )


def wrong_codes(
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


def against(
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


def remarks(
    read: Sequence[ReadEntry] | None, layers: Sequence[AuditedLayer], config: Mapping[str, Any]
) -> Iterator[str]:
    """What a reader of the list should know, though nothing disagrees."""
    if quantization_of(config) is None and all(x.state in ("16-bit", "tied") for x in layers):
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


def two_checkpoints(folder: Path) -> Iterator[str]:
    """That the folder holds two checkpoints, of which one is read."""
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        yield (
            f"The folder holds {SINGLE} and {INDEX}; transformers loads the first and ignores the other, "
            f"and so does this audit. Delete the one that is stale."
        )


def _some(names: Sequence[str], joint: str = ", ", shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return joint.join(names[:shown]) + more
