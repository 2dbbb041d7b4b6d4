"""What a storage format must do for a scan to measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qprobe.errors import QprobeError
from qprobe.records import FormatSpec
from qprobe.registry.implementation import imported
from qprobe.registry.precisions import measurable


class Packed(Protocol):
    """One weight as a format stores it."""

    def unpack(self) -> Tensor:
        """The weight as the format reads it back: (out_features, in_features), original dtype."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of the stored form that grows with the weight."""
        ...

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Packed:
        """The same weight with copies of its `tensors`, maybe on another device."""
        ...


class Format(Protocol):
    """A way to store a weight of a linear layer."""

    @property
    def name(self) -> str: ...

    def pack(self, weight: Tensor) -> Packed:
        """The stored form of `weight` (out_features, in_features), on the weight's device."""
        ...

    def held_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the `tensors` of a packed weight of `shape`."""
        ...

    def packing_bytes(self, shape: tuple[int, ...], device: torch.device) -> int:
        """The most bytes that `pack` takes at once on `device` for a weight of `shape`, beside the weight."""
        ...

    def row_parts(self, shape: tuple[int, int]) -> list[slice]:
        """The rows of a weight cut into parts that can be dequantized one after the other."""
        ...

    def dequantized_parts(
        self, parts: Sequence[Callable[[], Tensor]], device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(W, W-hat) of each part of one weight, in `dtype` on `device`: the same numbers as of `pack`.

        parts: functions that read the parts that `row_parts` cuts, of any dtype and device; each is called
        twice at most. For weights that would not fit into memory in 16-bit and 4-bit at once.
        """
        ...


def format_from(spec: FormatSpec) -> Format:
    """The format that `spec` names. Raises QprobeError for one that is not declared or not implemented."""
    path = spec.precision.implementation
    if path is None:
        raise QprobeError(
            f"Nothing can be measured in {spec.name}. "
            f"Choose one of {', '.join(x.name for x in measurable())}."
        )
    return imported(path)(spec)
