"""Bytes of a model under one choice of 4-bit layers: plain arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from qprobe.records import Inventory, Linear
from qprobe.registry.precisions import four_bit_bytes, packed_bytes


class Beside(Protocol):
    """Something beside the linears (`qprobe.checkpoint.outside.Outside`)."""

    @property
    def bytes(self) -> int: ...

    @property
    def parameter_bytes(self) -> int: ...


@dataclass(frozen=True)
class Layout:
    """Which linears are in 4-bit, and how their block scales are stored.

    double_quant: block scales in 8 bit with fp32 scales of their own (True) or fp32 each (False); None where
        nothing is in 4-bit.
    note: a sentence a reader must see, or "".
    """

    name: str
    four_bit: frozenset[str]
    double_quant: bool | None
    blocksize: int = 64
    note: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Bytes:
    """parameter_bytes: 4-bit codes and every 16-bit parameter, as published figures count.

    total_bytes: those, the block scales of the 4-bit weights, and buffers saved with the model.
    """

    layers_4bit: int
    parameter_bytes: int
    total_bytes: int


def bytes_of(layers: Iterable[Linear], beside: Iterable[Beside], layout: Layout) -> Bytes:
    """Bytes of these linears and of what is beside them under `layout`."""
    count = parameters = total = 0
    for x in layers:
        if x.name in layout.four_bit:
            count += 1
            parameters += packed_bytes(x.shape)
            total += four_bit_bytes(x.shape, layout.blocksize, bool(layout.double_quant))
        else:
            parameters += x.bytes_16bit
            total += x.bytes_16bit
    for item in beside:
        parameters += item.parameter_bytes
        total += item.bytes
    return Bytes(count, parameters, total)


def standard_layouts(inventory: Inventory) -> tuple[Layout, ...]:
    """16-bit, and every linear but the fixed ones in NF4 or FP4.

    FP4 is what `load_in_4bit=True` alone gives in transformers, whose BitsAndBytesConfig defaults to FP4
    without double quantization; a code of FP4 takes 4 bits as one of NF4 does.
    """
    quantizable = frozenset(x.name for x in inventory.layers if not x.fixed)
    return (
        Layout("16-bit", frozenset(), None),
        Layout("nf4", quantizable, True),
        Layout("nf4-single", quantizable, False),
        Layout(
            "fp4",
            quantizable,
            False,
            note="fp4 is what load_in_4bit=True alone gives: FP4 without double quantization, the default of "
            "transformers' BitsAndBytesConfig; with it, FP4 takes as many bytes as nf4.",
        ),
    )
