"""The NF4 round trip of one weight in parts, for weights whose round trip would not fit into memory.

bitsandbytes quantizes each block of 64 weights on its own, but block scales over the whole weight (their
mean is taken off first). So codes and scales are made part by part, scales are rounded together, and then
each part is read back: the same numbers as at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qprobe.formats.nf4 import Nf4

PART = 2**20  # elements; bitsandbytes takes 13 bytes an element while it quantizes on the CPU


def roundtrip_parts(
    weight: Tensor, fmt: Nf4, device: torch.device, dtype: torch.dtype, part: int = PART
) -> Iterator[tuple[Tensor, Tensor]]:
    """(W, W-hat) part by part, both (1, elements) in `dtype` on `device`; the weight is read twice.

    weight: of any dtype and device, cast to `dtype` first. part: elements, a multiple of the blocksize; a
    weight whose rows are none is one part.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

    assert part % fmt.blocksize == 0, part
    if weight.shape[-1] % fmt.blocksize:
        # bitsandbytes 0.50.2 on the CPU reads such rows back in a way of its own, which depends on the shape.
        whole = weight.detach().to(device, dtype)
        yield whole.reshape(1, -1), fmt.roundtrip(whole).reshape(1, -1)
        return
    flat = weight.detach().reshape(1, -1).split(part, dim=1)
    codes, states = [], []
    for piece in flat:
        packed, state = quantize_4bit(
            piece.to(device, dtype).contiguous(), blocksize=fmt.blocksize, quant_type="nf4"
        )
        codes.append(packed)
        states.append(state)
    scales = torch.cat([state.absmax for state in states])
    if fmt.double_quant:
        scales = _rounded(scales)
    for piece, packed, state, own in zip(
        flat, codes, states, scales.split(part // fmt.blocksize), strict=True
    ):
        read = QuantState(own, state.shape, state.code, state.blocksize, state.quant_type, state.dtype)
        yield piece.to(device, dtype), dequantize_4bit(packed, read)


def _rounded(scales: Tensor) -> Tensor:
    """Block scales as double quantization reads them back (bitsandbytes 0.50, `functional.quantize_4bit`)."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    from qprobe.formats.sizes import NESTED_BLOCKSIZE

    offset = scales.mean()
    codes, state = quantize_blockwise(scales - offset, blocksize=NESTED_BLOCKSIZE)
    return (dequantize_blockwise(codes, state) + offset).float()
