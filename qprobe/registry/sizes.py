"""Exact bytes of one stored weight; plain integers, no torch.

Per-tensor code tables (the 16 NF4 values, the 256 codes of the nested absmax and its offset, about
1 KB a layer) are constants that bitsandbytes repeats for every layer; they are not counted.
"""

from __future__ import annotations

from math import prod

NESTED_BLOCKSIZE = 256  # bitsandbytes quantizes the absmax in blocks of 256 (functional.quantize_4bit)


def _blocks(elements: int, blocksize: int) -> int:
    return -(-elements // blocksize)


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of the 4-bit codes of a weight of `shape`: two codes a byte."""
    return _blocks(prod(shape), 2)


def absmax_bytes(shape: tuple[int, ...], blocksize: int, double_quant: bool) -> int:
    """Bytes of the block scales: fp32 each, or one byte each plus an fp32 scale for every 256 of them."""
    blocks = _blocks(prod(shape), blocksize)
    if not double_quant:
        return 4 * blocks
    return blocks + 4 * _blocks(blocks, NESTED_BLOCKSIZE)


def four_bit_bytes(shape: tuple[int, ...], blocksize: int, double_quant: bool) -> int:
    """Bytes of codes and block scales together: what a 4-bit weight occupies."""
    return packed_bytes(shape) + absmax_bytes(shape, blocksize, double_quant)


def sixteen_bit_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a weight of `shape` in bf16 or fp16."""
    return 2 * prod(shape)
