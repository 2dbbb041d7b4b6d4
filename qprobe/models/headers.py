"""What lies in a checkpoint's safetensors files, from their headers alone: names, dtypes, shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qprobe.errors import ModelError
from qprobe.registry.precisions import quant_types
from qprobe.system.foreign import is_plain_name, open_foreign, read_foreign
from qprobe.system.headers.tensors import read_tensor_header
from qprobe.system.wording import shortened

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON_BYTES = 32 * 2**20  # which JSON can make a GiB of; an index has about 100 bytes per tensor
QUANT_STATE = ".quant_state.bitsandbytes__"  # bitsandbytes 0.50, functional.py, `QuantState.as_dict`


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
    return stored_parameter(tensors, f"{layer}.weight")


def stored_parameter(tensors: Mapping[str, StoredTensor], name: str) -> StoredWeight | None:
    """The parameter that the files call `name`; None if they hold none."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    codes = next((c for c in quant_types("bitsandbytes") if f"{name}{QUANT_STATE}{c}" in tensors), None)
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
        if not is_plain_name(file):
            raise ModelError(
                f"{INDEX} names the file {shortened(repr(file), 80)}, which lies elsewhere; copy "
                "the checkpoint again."
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
            f"{INDEX} lists {shortened(lost[0], 120)} in {where[lost[0]]}, which does not hold it; "
            "copy the checkpoint again."
        )
    return found


def _header(path: Path) -> dict[str, StoredTensor]:
    with open_foreign(path, ModelError, "Copy the file again.", None) as file:
        try:
            entries, _ = read_tensor_header(file)
        except ValueError as error:
            raise ModelError(f"The header of {path} is damaged ({error}); copy the file again.") from None
    return {name: StoredTensor(x.dtype, x.shape, x.nbytes, path.name) for name, x in entries.items()}


def _json(path: Path) -> Any:
    data = read_foreign(path, ModelError, "Copy the checkpoint again.", MAX_JSON_BYTES)
    try:
        # Not `strict_json`: transformers writes Infinity into configs (`time_step_limit` of Mamba-2).
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no valid JSON ({error}); copy the checkpoint again.") from error
