"""The header of a safetensors file: what lies in it and where, without reading it.

Eight bytes with the length of a JSON header, the header, the data (https://huggingface.co/docs/safetensors).
Read here and not by `safe_open`, which lets a name pass that stands twice, refuses dtypes that are newer than
itself, and does not say where the bytes of a tensor lie.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

from qprobe.system.decoding import decode, strict_json
from qprobe.system.wording import shortened

MAX_HEADER_BYTES = 32 * 2**20  # which JSON can make a GiB of; those of the largest models have 10
# Bits of an element, from the format's own list; of a dtype that is newer, the size cannot be checked.
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header describes it. data_offsets: its first byte and the one behind, in the data."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


def read_tensor_header(file: BinaryIO) -> tuple[dict[str, TensorEntry], int]:
    """(entries by tensor name, where the data starts) of a safetensors file that is open at its start.

    Raises ValueError, saying why, if the file is cut off, is none, or its header contradicts itself.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"it is cut off or no safetensors file: {size:,} bytes, but a header of {length:,} bytes is "
            "announced"
        )
    header = strict_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("it is no JSON object")
    entries = {
        name: decode(TensorEntry, entry, shortened(name, 80))
        for name, entry in header.items()
        if name != "__metadata__"
    }
    for entry in entries.values():
        _check(entry, size - 8 - length)
    _check_together(header.get("__metadata__"), entries.values(), size - 8 - length)
    return entries, 8 + length


def _check_together(metadata: Any, entries: Iterable[TensorEntry], data_bytes: int) -> None:
    """Raises ValueError where the library would: the tensors must fill the data, one behind the other."""
    is_text = isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values())
    if metadata is not None and not is_text:
        raise ValueError("its __metadata__ holds something that is no text")
    end = 0
    for start, behind in sorted(x.data_offsets for x in entries):
        if start != end:
            raise ValueError(f"a tensor begins at byte {start:,}, and the one before ends at {end:,}")
        end = behind
    if end != data_bytes:
        raise ValueError(f"its tensors end at byte {end:,} of {data_bytes:,}")


def _check(entry: TensorEntry, data_bytes: int) -> None:
    start, end = entry.data_offsets
    if not 0 <= start <= end:
        raise ValueError(f"a tensor lies at {start} to {end}")
    if end > data_bytes:
        raise ValueError(f"a tensor ends at byte {end:,} of {data_bytes:,}, so the file is cut off")
    bits = DTYPE_BITS.get(entry.dtype)
    is_wrong = bits is not None and bits * prod(entry.shape) != 8 * entry.nbytes
    if min(entry.shape, default=0) < 0 or is_wrong:
        what = f"{shortened(entry.dtype, 20)} {shortened(str(list(entry.shape)), 80)}"
        raise ValueError(f"a tensor of {what} has {entry.nbytes:,} bytes")
