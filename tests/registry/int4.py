"""A 4-bit precision that the package does not know: integers from -7 to 7, one float32 scale for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from qprobe.records import FormatSpec
from qprobe.registry.precisions import Precision, packed_bytes


@dataclass(frozen=True)
class PackedRows:
    """One weight; codes are kept unpacked, a byte each."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def unpack(self) -> Tensor:
        return (self.codes * self.scales).to(self.dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> PackedRows:
        return PackedRows(*tensors, self.dtype)


@dataclass(frozen=True)
class Rows:
    """The format."""

    name: str

    def pack(self, weight: Tensor) -> PackedRows:
        scales = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
        codes = (weight.float() / scales).round().to(torch.int8)
        return PackedRows(codes, scales, weight.dtype)

    def held_bytes(self, shape: tuple[int, int]) -> int:
        return prod(shape) + 4 * shape[0]

    def packing_bytes(self, shape: tuple[int, int], device: torch.device) -> int:
        return 9 * prod(shape)

    def row_parts(self, shape: tuple[int, int]) -> list[slice]:
        return [slice(row, row + 8) for row in range(0, shape[0], 8)]

    def dequantized_parts(
        self, parts: Sequence[Callable[[], Tensor]], device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for read in parts:
            weight = read().to(device, dtype)
            yield weight, self.pack(weight).unpack()


def rows(spec: FormatSpec) -> Rows:
    return Rows(spec.name)


def row_bytes(shape: tuple[int, ...], blocksize: int, double_quant: bool) -> int:
    return packed_bytes(shape) + 4 * prod(shape[:-1])


PRECISION = Precision("int4-rows", "INT4 by rows", 4, row_bytes, implementation="tests.registry.int4:rows")
