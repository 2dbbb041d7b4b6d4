"""NF4 as bitsandbytes stores it: nearest of 16 normal-quantile values, one absmax per block.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from qprobe.formats import chunks
from qprobe.records import FormatSpec
from qprobe.registry.precisions import absmax_bytes, packed_bytes

# What bitsandbytes takes for each element while it quantizes a weight; on a GPU it works in parts.
_PACKING_BYTES = {"cpu": 13, "cuda": 4}


@dataclass(frozen=True)
class PackedNf4:
    """4-bit codes and their quantization state, on one device.

    The state's block scales are kept as they are read back (float32, 1/16 byte a weight), so that unpacking
    is one kernel and not three; the values are those of the doubly quantized scales.
    """

    codes: Tensor
    state: Any  # bitsandbytes.functional.QuantState

    def unpack(self) -> Tensor:
        """The weight as bitsandbytes computes with it: (out_features, in_features), original dtype."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes, self.state)

    def scaled(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """(out_features, in_features): what the codes read as under the block scales `scales`, in `dtype`."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes, _with_scales(self.state, scales, dtype))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes and block scales; the table of 16 values stays with the state."""
        return self.codes, self.state.absmax

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> PackedNf4:
        """The same weight with copies of its `tensors`."""
        codes, absmax = tensors
        return PackedNf4(codes, _with_scales(self.state, absmax))


@dataclass(frozen=True)
class StoredNf4:
    """One weight exactly as bitsandbytes stores it: what `Params4bit.from_prequantized` takes as its own.

    codes: (ceil(n / 2), 1) uint8, two codes a byte. state: with its block scales nested, if the format says
    so.
    """

    codes: Tensor
    state: Any  # bitsandbytes.functional.QuantState

    def packed(self) -> PackedNf4:
        """The same weight for reading."""
        return PackedNf4(self.codes, _with_plain_scales(self.state))


@dataclass(frozen=True)
class Nf4:
    """bitsandbytes NF4; `double_quant` stores the block scales in 8 bit as well."""

    blocksize: int = 64
    double_quant: bool = True
    name: str = "nf4"

    def stored(self, weight: Tensor) -> StoredNf4:
        """`weight` rounded to nearest, by bitsandbytes itself."""
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(
            weight.detach().contiguous(),
            blocksize=self.blocksize,
            compress_statistics=self.double_quant,
            quant_type="nf4",
        )
        return StoredNf4(codes, state)

    def pack(self, weight: Tensor) -> PackedNf4:
        return self.stored(weight).packed()

    def held_bytes(self, shape: tuple[int, ...]) -> int:
        return absmax_bytes(shape, self.blocksize, double_quant=False) + packed_bytes(shape)

    def packing_bytes(self, shape: tuple[int, ...], device: torch.device) -> int:
        return _PACKING_BYTES.get(device.type, _PACKING_BYTES["cuda"]) * prod(shape)

    def row_parts(self, shape: tuple[int, int]) -> list[slice]:
        return chunks.row_parts(shape, self.blocksize)

    def dequantized_parts(
        self, parts: Sequence[Callable[[], Tensor]], device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return chunks.dequantized_parts(parts, self.blocksize, self.double_quant, device, dtype)


def _with_plain_scales(state: Any) -> Any:
    """`state` with its nested block scales read back, the way bitsandbytes' dequantize_4bit does."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state
    return _with_scales(state, (dequantize_blockwise(state.absmax, state.state2) + state.offset).float())


def _with_scales(state: Any, absmax: Tensor, dtype: torch.dtype | None = None) -> Any:
    """`state` with the plain block scales `absmax`, to be read in `dtype` (None: in its own)."""
    from bitsandbytes.functional import QuantState

    return QuantState(
        absmax=absmax,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=dtype or state.dtype,
    )


def nf4(spec: FormatSpec) -> Nf4:
    """The NF4 that `spec` describes. Calibrated weights are stored alike; the name tells them apart."""
    return Nf4(spec.blocksize, spec.double_quant, spec.name)
