"""Bytes that a loaded model really occupies, summed over its tensors' storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qprobe.checkpoint.experts.four_bit import four_bit_experts


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of a loaded model.

    parameter_bytes: packed 4-bit weights and every 16-bit parameter, as published figures count.
    total_bytes: those, persistent buffers, and the block scales (absmax) of the 4-bit weights.
    """

    parameter_bytes: int
    total_bytes: int


def stored_bytes(model: nn.Module) -> StoredBytes:
    """What `model` occupies, each storage counted once however many names share it.

    Not counted: the per-tensor code tables that bitsandbytes repeats for every 4-bit layer (16 NF4
    values, 256 codes of the nested absmax, one offset; about 1 KB per layer), and buffers that are
    recomputed on loading (not persistent).
    """
    parameters = list(model.parameters())
    states = [getattr(x, "quant_state", None) for x in parameters]
    states += four_bit_experts(model).values()
    scales = [scale for state in states if state is not None for scale in _scales(state)]
    return StoredBytes(
        parameter_bytes=_sum_storage(parameters),
        total_bytes=_sum_storage([*parameters, *persistent_buffers(model), *scales]),
    )


def persistent_buffers(model: nn.Module) -> Iterator[Tensor]:
    """The buffers that belong to the checkpoint.

    Not through `state_dict`, which packs the state of every 4-bit layer again.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _scales(state: Any) -> Iterator[Tensor]:
    """The absmax of a 4-bit weight, and the fp32 scales of that absmax if it is nested."""
    yield state.absmax
    if state.nested:
        yield state.state2.absmax


def _sum_storage(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())
