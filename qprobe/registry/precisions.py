"""The precisions a weight can be stored in, and their exact bytes; plain integers, no torch.

A precision is one entry of `DECLARED` and one implementation in `qprobe.formats`. Everything
else asks here: for the precision of a name, for its bytes, for the one in 16-bit. The names are those in
skiplist.json and after --format.

Per-tensor code tables (the 16 NF4 values, the 256 codes of the nested absmax and its offset, about
1 KB per layer) are constants that bitsandbytes repeats for every layer; they are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from qprobe.errors import QprobeError

NESTED_BLOCKSIZE = 256  # bitsandbytes quantizes the absmax in blocks of 256 (functional.quantize_4bit)

Shape = tuple[int, ...]


def _blocks(elements: int, blocksize: int) -> int:
    return -(-elements // blocksize)


def packed_bytes(shape: Shape) -> int:
    """Bytes of the 4-bit codes of a weight of `shape`: two codes a byte."""
    return _blocks(prod(shape), 2)


def absmax_bytes(shape: Shape, blocksize: int, double_quant: bool) -> int:
    """Bytes of the block scales: fp32 each, or one byte each plus an fp32 scale for every 256 of them."""
    blocks = _blocks(prod(shape), blocksize)
    if not double_quant:
        return 4 * blocks
    return blocks + 4 * _blocks(blocks, NESTED_BLOCKSIZE)


def four_bit_bytes(shape: Shape, blocksize: int, double_quant: bool) -> int:
    """Bytes of codes and block scales together: what a 4-bit weight of bitsandbytes occupies."""
    return packed_bytes(shape) + absmax_bytes(shape, blocksize, double_quant)


def sixteen_bit_bytes(shape: Shape) -> int:
    """Bytes of a weight of `shape` in bf16 or fp16."""
    return 2 * prod(shape)


@dataclass(frozen=True)
class Precision:
    """One way to store a weight.

    name: in files and options. title: in sentences. bits: of one element's code.
    bytes_of: (shape, blocksize, double_quant) -> bytes of a stored weight.
    implementation: import path of a function from a `FormatSpec` to a `qprobe.formats.protocol.Format`;
        None for what is only recognized and sized, such as 16-bit itself.
    loader: the library whose modules hold it in a loaded model and whose container its files have; None for a
        plain tensor. quant_type: what that library calls it.
    stored_as: the precision of its files and of a manifest's layers, where this one differs from that only in
        how its codes are chosen; None for itself.
    is_calibrated: the codes are chosen on samples and lie in a file of their own.
    """

    name: str
    title: str
    bits: int
    bytes_of: Callable[[Shape, int, bool], int]
    implementation: str | None = None
    loader: str | None = None
    quant_type: str | None = None
    stored_as: str | None = None
    is_calibrated: bool = False

    @property
    def is_four_bit(self) -> bool:
        return self.bits == 4

    @property
    def stored(self) -> Precision:
        """The precision that a manifest's layers name."""
        return self if self.stored_as is None else precision(self.stored_as)


SIXTEEN_BIT = Precision("bf16", "16-bit", 16, lambda shape, blocksize, double_quant: sixteen_bit_bytes(shape))
"""The precision of every layer that is kept; it stands for bf16 and fp16 alike."""

NF4 = Precision(
    "nf4",
    "NF4",
    4,
    four_bit_bytes,
    implementation="qprobe.formats.nf4:nf4",
    loader="bitsandbytes",
    quant_type="nf4",
)
"""The default: rounded to nearest, what bitsandbytes makes of a 16-bit checkpoint."""

NF4_CALIBRATED = Precision(
    "nf4-calibrated",
    "calibrated NF4",
    4,
    four_bit_bytes,
    implementation="qprobe.formats.nf4:nf4",  # without a Gram matrix of the inputs it rounds to nearest
    loader="bitsandbytes",
    quant_type="nf4",
    stored_as="nf4",
    is_calibrated=True,
)
"""NF4 with the codes chosen for the outputs on calibration samples (`qprobe.calibration.codes`)."""

FP4 = Precision("fp4", "FP4", 4, four_bit_bytes, loader="bitsandbytes", quant_type="fp4")
"""Sized in plans and recognized in checkpoints; nothing is measured in it."""

DECLARED: tuple[Precision, ...] = (NF4, NF4_CALIBRATED, FP4, SIXTEEN_BIT)


def precision(name: str) -> Precision:
    """The precision called `name`. Raises QprobeError, naming those that a scan can measure, for another."""
    found = find(name)
    if found is None:
        raise QprobeError(
            f"Format {name!r} is not known. Known formats: {', '.join(x.name for x in measurable())}."
        )
    return found


def find(name: str) -> Precision | None:
    """The precision called `name`, if it is declared."""
    return next((x for x in DECLARED if x.name == name), None)


def measurable() -> tuple[Precision, ...]:
    """The 4-bit precisions that are implemented, so that a scan and a manifest can be in them."""
    return tuple(x for x in DECLARED if x.is_four_bit and x.implementation is not None)


def is_four_bit(name: str) -> bool:
    """True if the precision called `name` is a 4-bit one. Raises QprobeError if it is not declared."""
    return precision(name).is_four_bit


def quant_types(loader: str) -> tuple[str, ...]:
    """What `loader` calls the layouts that are known of it, each once."""
    found = [x.quant_type for x in DECLARED if x.loader == loader and x.quant_type is not None]
    return tuple(dict.fromkeys(found))
