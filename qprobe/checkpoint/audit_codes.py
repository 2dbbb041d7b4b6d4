"""The part of `qprobe audit` that compares the 4-bit weights of a checkpoint with calibrated ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qprobe.checkpoint.audit_states import numbers_of
from qprobe.errors import ManifestError
from qprobe.formats.codes_file import CodesReader, checked, open_codes
from qprobe.manifest.records import Manifest
from qprobe.models.headers import QUANT_STATE, StoredTensor, StoredWeight

# What calibration chooses: codes and block scales; the other state tensors are tables and metadata, among it
# the offset of nested scales, which lies in the JSON object of the state.
_CHOSEN = ("absmax", "nested_absmax")
_OFFSET = "nested_offset"


def uncalibrated(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    weights: Mapping[str, StoredWeight | None],
    manifest: Manifest,
    beside: Path,
) -> Iterator[str]:
    """A sentence if 4-bit weights of the checkpoint in `folder` are not the calibrated ones of `manifest`.

    tensors: of the checkpoint, by key; weights: of each linear by module name; beside: the folder from which
    `manifest` names its file. A layer that this file does not hold is one that calibration left as it was.
    """
    if manifest.codes is None:
        return
    try:
        path = checked(manifest.codes, beside)
        with open_codes(path) as file:
            four_bit = [x.name for x in manifest.layers if x.precision == "nf4" and x.name in file.layers]
            packed = {name: weights.get(name) for name in four_bit}
            present = {name: x for name, x in packed.items() if x is not None and x.four_bit == "nf4"}
            wrong = [name for name, x in present.items() if not _same(folder, tensors, x, file, name)]
    except ManifestError as error:
        yield f"The calibrated codes could not be compared: {error}"
        return
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        yield (
            f"{len(wrong)} of {len(present)} linears in 4-bit do not hold the calibrated codes of the "
            f"manifest ({manifest.codes.file}), so the checkpoint has not the KL that it names: "
            f"{', '.join(wrong[:3])}{more}. Write the checkpoint with `qprobe quantize`."
        )


def _same(
    folder: Path, tensors: Mapping[str, StoredTensor], weight: StoredWeight, file: CodesReader, layer: str
) -> bool:
    """True if the checkpoint's codes and block scales of `layer` are those in `file`, byte for byte."""
    codes, state = file.raw(layer)
    wanted = {weight.name: codes}
    wanted |= {f"{weight.name}.{part}": state[part] for part in _CHOSEN if part in state}
    if not all(key in tensors and _equal(_read(folder, tensors, key), x) for key, x in wanted.items()):
        return False
    part = f"{QUANT_STATE}{weight.four_bit}"
    key, ours = f"{weight.name}{part}", state.get(part.removeprefix("."))
    if ours is None or key not in tensors:
        return False
    found, wanted_numbers = numbers_of(_read(folder, tensors, key)), numbers_of(ours)
    return None not in (found, wanted_numbers) and _offset(found) == _offset(wanted_numbers)


def _offset(numbers: Mapping[str, Any] | None) -> Any:
    return None if numbers is None else numbers.get(_OFFSET)


def _read(folder: Path, tensors: Mapping[str, StoredTensor], key: str) -> Tensor:
    """The tensor `key` from its own shard: a weight and its block scales may lie in two."""
    from safetensors import safe_open

    with safe_open(folder / tensors[key].file, framework="pt", device="cpu") as found:
        return found.get_tensor(key)


def _equal(found: Tensor, wanted: Tensor) -> bool:
    """True if both hold the same values in the same dtype, in whatever shape."""
    return found.dtype == wanted.dtype and torch.equal(found.flatten(), wanted.flatten())
