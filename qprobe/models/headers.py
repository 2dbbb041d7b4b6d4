"""What lies in a checkpoint's safetensors files, from their headers alone: names, dtypes, shapes; no torch.

The format: eight bytes with the length of a JSON header, the header, the data
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qprobe.errors import ModelError
from qprobe.system.decoding import strict_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_JSON_BYTES = 256 * 2**20  # an index has about 100 bytes a tensor
QUANT_STATE = ".quant_state.bitsandbytes__"  # bitsandbytes 0.50, functional.py, `QuantState.as_dict`
# Bits of an element, from the format's own list; of a dtype that is newer, the size cannot be checked.
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its header describes it. dtype: as safetensors names it ("BF16", "U8")."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class StoredWeight:
    """The weight of one linear in the files.

    name: its key there. four_bit: "nf4" or "fp4" of the codes, None for a plain tensor. absmax: number of
    block scales. nested: whether the scales are quantized too.
    """

    name: str
    tensor: StoredTensor
    four_bit: str | None
    absmax: int = 0
    nested: bool = False


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of the checkpoint in `folder`. Raises ModelError if there is none, or it is broken."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; pass the folder of a checkpoint.")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} holds no config.json, so it is no checkpoint; pass the folder that does.")
    config = _json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object; copy the checkpoint again.")
    return config


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, by name, without reading any weight.

    Of the files that transformers loads: the single one where it is there, whatever an index says
    (transformers 5.23, modeling_utils.py, `_get_resolved_checkpoint_files`).

    Raises ModelError, naming the file, if one is missing, cut off, or no safetensors file.
    """
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    others = sorted(x.name for x in folder.glob("*.bin"))
    found = f"only {others[0]}, a pickle, which qprobe does not read" if others else "no weights"
    raise ModelError(f"{folder} holds {found}: neither {SINGLE} nor {INDEX}; save the model as safetensors.")


def stored_weight(tensors: Mapping[str, StoredTensor], layer: str) -> StoredWeight | None:
    """The weight of the linear that the files call `layer`; None if they hold none."""
    name = f"{layer}.weight"
    tensor = tensors.get(name)
    if tensor is None:
        return None
    codes = next((c for c in ("nf4", "fp4") if f"{name}{QUANT_STATE}{c}" in tensors), None)
    absmax = tensors.get(f"{name}.absmax")
    if codes is None or absmax is None:
        return StoredWeight(name, tensor, None)
    return StoredWeight(name, tensor, codes, absmax.elements, f"{name}.nested_absmax" in tensors)


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    index = _json(folder / INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(x, str) for x in where.values()):
        raise ModelError(
            f"{folder / INDEX} has no weight_map of tensors to files; copy the checkpoint again."
        )
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise ModelError(
                f"{INDEX} names the file {file!r}, which lies elsewhere; copy the checkpoint again."
            )
        if not (folder / file).is_file():
            lost = sum(x == file for x in where.values())
            raise ModelError(
                f"{INDEX} names {file}, which is missing with {lost} tensors; copy the checkpoint again."
            )
        found |= _header(folder / file)
    lost = [name for name in where if name not in found]
    if lost:
        raise ModelError(
            f"{INDEX} lists {lost[0]} in {where[lost[0]]}, which does not hold it; copy the checkpoint again."
        )
    return found


def _header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(
                f"{path} is cut off or no safetensors file: {size:,} bytes, but a header of {length:,} bytes "
                f"is announced; copy it again."
            )
        text = file.read(length)
    try:
        header = strict_json(text)
        tensors = {
            name: _tensor(entry, size - 8 - length, path.name)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"The header of {path} is damaged ({error}); copy the file again.") from error
    return tensors


def _tensor(entry: dict[str, Any], data_bytes: int, file: str) -> StoredTensor:
    start, end = entry["data_offsets"]
    if not 0 <= start <= end:
        raise ValueError(f"a tensor lies at {start} to {end}")
    if end > data_bytes:
        raise ValueError(f"a tensor ends at byte {end:,} of {data_bytes:,}, so the file is cut off")
    dtype, shape = str(entry["dtype"]), tuple(int(x) for x in entry["shape"])
    bits = DTYPE_BITS.get(dtype)
    if min(shape, default=0) < 0 or (bits is not None and bits * prod(shape) != 8 * (end - start)):
        raise ValueError(f"a tensor of {dtype} {list(shape)} has {end - start:,} bytes")
    return StoredTensor(dtype, shape, end - start, file)


def _json(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ModelError(f"{path} is larger than {MAX_JSON_BYTES // 2**20} MiB; check the path.")
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no valid JSON ({error}); copy the checkpoint again.") from error
