"""NF4 weights dequantized in parts, for those of which both forms would not fit into memory.

bitsandbytes quantizes each block of 64 weights on its own, but block scales over the whole weight (their
mean is taken off first). So codes and scales are made part by part, scales are rounded together, and then
each part is read back: the same numbers as at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qprobe.registry.precisions import NESTED_BLOCKSIZE

PART = 2**20  # elements; bitsandbytes takes 13 bytes an element while it quantizes on the CPU


def row_parts(shape: tuple[int, int], blocksize: int, part: int | None = None) -> list[slice]:
    """The rows of a weight cut into parts of about `part` elements (None for `PART`), each of whole blocks.

    A weight whose rows are not of whole blocks is one part: bitsandbytes 0.50.2 on the CPU reads such rows
    back in a way of its own, which depends on the shape.
    """
    rows, columns = shape
    step = rows if columns % blocksize else max(1, (part or PART) // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def dequantized_parts(
    parts: Sequence[Callable[[], Tensor]],
    blocksize: int,
    double_quant: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(W, W-hat) of each part of one weight, in `dtype` on `device`.

    parts: functions that read the parts that `row_parts` cuts, of any dtype and device; each is called twice.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

    codes, states = [], []
    for read in parts:
        piece = read().to(device, dtype).contiguous()
        packed, state = quantize_4bit(piece, blocksize=blocksize, quant_type="nf4")
        codes.append(packed)
        states.append(state)
    scales = torch.cat([state.absmax for state in states])
    if double_quant:
        scales = _rounded(scales)
    own = scales.split([state.absmax.numel() for state in states])
    for read, packed, state, absmax in zip(parts, codes, states, own, strict=True):
        plain = QuantState(absmax, state.shape, state.code, state.blocksize, state.quant_type, state.dtype)
        yield read().to(device, dtype), dequantize_4bit(packed, plain)


def _rounded(scales: Tensor) -> Tensor:
    """Block scales as double quantization reads them back (bitsandbytes 0.50, `functional.quantize_4bit`)."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    offset = scales.mean()
    codes, state = quantize_blockwise(scales - offset, blocksize=NESTED_BLOCKSIZE)
    return (dequantize_blockwise(codes, state) + offset).float()
