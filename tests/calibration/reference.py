"""Slow, obvious oracles of 4-bit rounding."""

from __future__ import annotations

import torch
from bitsandbytes.functional import get_4bit_type
from torch import Tensor


def bitsandbytes_thresholds() -> list[float]:
    """The constants of dQuantizeNF4 in csrc/kernels.cu of bitsandbytes, ascending."""
    return [
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
        -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
        0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
        0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ]  # fmt: skip


def unpacked(codes: Tensor, count: int) -> Tensor:
    """(count,) codes from packed bytes, the first of two in the upper half of a byte."""
    flat = codes.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:count].long()


def brute_force(row: Tensor, gram: Tensor, scale: float) -> float:
    """The least error e G e^T over all codes of a row of a few weights."""
    values = get_4bit_type("nf4", device="cpu") * scale
    choices = torch.cartesian_prod(*[torch.arange(16)] * len(row))
    errors = values[choices] - row
    return float(((errors @ gram) * errors).sum(dim=1).min())


def rounded_columns(base: Tensor, own: Tensor, scales: Tensor, coupling: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, errors) of every row and column, one number at a time; see `round_columns`."""
    values = get_4bit_type("nf4", device="cpu").tolist()
    thresholds = bitsandbytes_thresholds()
    codes, errors = torch.empty_like(own, dtype=torch.int32), torch.empty_like(own)
    for row in range(own.shape[1]):
        for i in range(own.shape[0]):
            target = float(base[i, row]) + sum(
                float(coupling[i, j]) * float(errors[j, row]) for j in range(i)
            )
            scale = float(scales[i, row])
            relative = target / scale if scale else 0.0
            code = sum(relative > x for x in thresholds)
            codes[i, row], errors[i, row] = code, float(own[i, row]) - values[code] * scale
    return codes, errors
