"""The part of `qprobe audit` that reads 4-bit weights: quantization states and calibrated codes.

bitsandbytes reads each weight by what its quantization state says. A wrong code table, block size or offset
of the block scales raises no error: the model loads, and every weight has another value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qprobe.errors import ManifestError
from qprobe.formats.codes_file import CodesReader, checked, open_codes
from qprobe.manifest.records import Manifest
from qprobe.models.headers import QUANT_STATE, StoredTensor, StoredWeight
from qprobe.records import FormatSpec, Linear
from qprobe.registry.precisions import NESTED_BLOCKSIZE
from qprobe.system.decoding import strict_json

_TOLERANCE = 1e-6  # of a table whose values lie in -1 to 1, computed by another version or device

Read = Callable[[str], Tensor | None]


def wrong_states(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    packed: Sequence[tuple[Linear, StoredWeight]],
    spec: FormatSpec,
) -> Iterator[str]:
    """A sentence if quantization states in `folder` are not those that the format must have.

    tensors: of the checkpoint, by key; packed: its linears in 4-bit. The weights themselves are not read.
    """
    wrong = []
    with ExitStack() as open_files:
        read = _reader(folder, tensors, open_files)
        for layer, weight in packed:
            problem = _problem(layer, weight, spec, read)
            if problem is not None:
                wrong.append(f"{layer.name} {problem}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        yield (
            f"{len(wrong)} of {len(packed)} linears in 4-bit have a quantization state that reads other "
            f"weights out of their codes: {'; '.join(wrong[:3])}{more}. Quantize the 16-bit model again."
        )


def _reader(folder: Path, tensors: Mapping[str, StoredTensor], open_files: ExitStack) -> Read:
    """Reads one tensor by key, each file opened once; None for a key that the checkpoint lacks."""
    from safetensors import safe_open

    handles: dict[str, Any] = {}

    def read(key: str) -> Tensor | None:
        if key not in tensors:
            return None
        name = tensors[key].file
        if name not in handles:
            opened = safe_open(folder / name, framework="pt", device="cpu")
            handles[name] = open_files.enter_context(opened)
        return handles[name].get_tensor(key)

    return read


def _problem(layer: Linear, weight: StoredWeight, spec: FormatSpec, read: Read) -> str | None:
    """What is wrong with the quantization state of one layer; None if nothing is."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    numbers = numbers_of(read(f"{weight.name}{QUANT_STATE}{weight.four_bit}"))
    if numbers is None:
        return "has a state that is no JSON object"
    expected = {
        "quant_type": weight.four_bit,
        "blocksize": spec.blocksize,
        "shape": list(layer.stored_shape),
        **({"nested_blocksize": NESTED_BLOCKSIZE} if weight.nested else {}),
    }
    for key, value in expected.items():
        if numbers.get(key) != value:
            return f"has {key} {numbers.get(key)!r}, not {value!r}"
    if not _is_table(read(f"{weight.name}.quant_map"), get_4bit_type(str(weight.four_bit), device="cpu")):
        return f"has a code table (quant_map) that is not that of {weight.four_bit}"
    if not weight.nested:
        return None
    if not _is_table(read(f"{weight.name}.nested_quant_map"), create_dynamic_map()):
        return "has a table of its block scales (nested_quant_map) that is not that of bitsandbytes"
    return _wrong_scales(numbers.get("nested_offset"), read(f"{weight.name}.nested_absmax"))


def _wrong_scales(offset: Any, absmax: Tensor | None) -> str | None:
    """What is wrong with the numbers that block scales are read back with.

    The offset is the mean of the block scales, each the largest magnitude of its block.
    """
    if absmax is None or not bool(torch.isfinite(absmax).all()) or bool((absmax < 0).any()):
        return "has scales of its block scales (nested_absmax) that are missing, negative or not finite"
    if not isinstance(offset, int | float) or not isfinite(offset) or offset < 0:
        return f"has nested_offset {offset!r}, which is no mean of block scales"
    if offset == 0 and bool(absmax.any()):
        return "has nested_offset 0, though its block scales are not all 0"
    return None


def numbers_of(state: Tensor | None) -> dict[str, Any] | None:
    """The JSON object that bitsandbytes packs into a tensor of bytes."""
    if state is None or state.dtype != torch.uint8:
        return None
    try:
        found = strict_json(bytes(state.tolist()))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_table(found: Tensor | None, wanted: Tensor) -> bool:
    if found is None or found.shape != wanted.shape or not found.is_floating_point():
        return False
    return torch.allclose(found.float(), wanted.float(), rtol=0, atol=_TOLERANCE)


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
            four_bit = [x.name for x in manifest.layers if x.is_four_bit and x.name in file.layers]
            packed = {name: weights.get(name) for name in four_bit}
            stored = manifest.format.quant_type
            present = {name: x for name, x in packed.items() if x is not None and x.four_bit == stored}
            wrong = [name for name, x in present.items() if not _is_same(folder, tensors, x, file, name)]
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


def _is_same(
    folder: Path, tensors: Mapping[str, StoredTensor], weight: StoredWeight, file: CodesReader, layer: str
) -> bool:
    """True if the checkpoint's codes and block scales of `layer` are those in `file`, byte for byte."""
    codes, state = file.raw(layer)
    wanted = {weight.name: codes}
    wanted |= {f"{weight.name}.{part}": state[part] for part in _CHOSEN if part in state}
    if not all(key in tensors and _equal(_read_tensor(folder, tensors, key), x) for key, x in wanted.items()):
        return False
    part = f"{QUANT_STATE}{weight.four_bit}"
    key, ours = f"{weight.name}{part}", state.get(part.removeprefix("."))
    if ours is None or key not in tensors:
        return False
    found, wanted_numbers = numbers_of(_read_tensor(folder, tensors, key)), numbers_of(ours)
    return None not in (found, wanted_numbers) and _offset(found) == _offset(wanted_numbers)


def _offset(numbers: Mapping[str, Any] | None) -> Any:
    return None if numbers is None else numbers.get(_OFFSET)


def _read_tensor(folder: Path, tensors: Mapping[str, StoredTensor], key: str) -> Tensor:
    """The tensor `key` from its own shard: a weight and its block scales may lie in two."""
    from safetensors import safe_open

    with safe_open(folder / tensors[key].file, framework="pt", device="cpu") as found:
        return found.get_tensor(key)


def _equal(found: Tensor, wanted: Tensor) -> bool:
    """True if both hold the same values in the same dtype, in whatever shape."""
    return found.dtype == wanted.dtype and torch.equal(found.flatten(), wanted.flatten())
