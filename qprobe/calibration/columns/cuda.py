"""The loops of `rounding.py` as kernels, in Triton, which comes with PyTorch for CUDA.

A program has 32 rows of one layer. To round columns it has a thread for each row and keeps their errors in
registers; nothing passes between threads. The loops would launch five small kernels a column, of which an 11B
model has four million, and two hundred for the scales of every 64 columns.
"""

# Triton is no dependency of ours: where it is missing, nothing imports this module.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qprobe.calibration.columns.grid import RATIOS, Grid

ROWS = 32  # a warp


@triton.jit
def _round(
    base, base_step, own, own_step, scales, scales_step, each, coupling, values, thresholds, codes, errors,
    programs, count, rows, width, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first = tl.load(programs + tl.program_id(0))
    end = tl.load(programs + count + tl.program_id(0))
    coupling += tl.load(programs + 2 * count + tl.program_id(0)) * width * width
    r = first + tl.arange(0, ROWS)
    inside = r < end
    j = tl.arange(0, WIDTH)
    k = tl.arange(0, 16)
    limits = tl.load(thresholds + k, mask=k < 15, other=float("inf"))
    found = tl.zeros((WIDTH, ROWS), tl.float32)
    for i in range(width):
        factors = tl.load(coupling + i * width + j, mask=j < i, other=0.0)
        target = tl.load(base + i * base_step + r, mask=inside, other=0.0)
        target += tl.sum(factors[:, None] * found, axis=0)
        scale = tl.load(scales + (i // each) * scales_step + r, mask=inside, other=0.0)
        relative = tl.where(scale == 0, 0.0, target * tl.div_rn(1.0, scale))
        code = tl.sum((relative[None, :] > limits[:, None]).to(tl.int32), axis=0)
        error = tl.load(own + i * own_step + r, mask=inside, other=0.0) - tl.load(values + code) * scale
        found = tl.where(j[:, None] == i, error[None, :], found)
        tl.store(codes + i * rows + r, code, mask=inside)
        tl.store(errors + i * rows + r, error, mask=inside)


def round_columns(
    base: Tensor, own: Tensor, scales: Tensor, coupling: Tensor, widths: tuple[int, ...], grid: Grid
) -> tuple[Tensor, Tensor]:
    """What `rounding.round_columns` gives; `base` stays as it is."""
    width, rows = base.shape
    assert width % len(scales) == 0
    assert base.stride(1) == own.stride(1) == scales.stride(1) == 1 or rows == 1
    codes = torch.empty((width, rows), dtype=torch.int32, device=base.device)
    errors = torch.empty((width, rows), dtype=torch.float32, device=base.device)
    programs = _programs(widths, base.device)
    with torch.cuda.device_of(base):  # Triton launches on the current one
        _round[(programs.shape[1],)](
            base, base.stride(0), own, own.stride(0), scales, scales.stride(0), width // len(scales),
            coupling.contiguous(), grid.values, grid.thresholds, codes, errors, programs, programs.shape[1],
            rows, width, WIDTH=max(16, triton.next_power_of_2(width)), ROWS=ROWS, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes, errors


@triton.jit
def _search(
    values, step, costs, numbers, thresholds, ratios, found, programs, count, size, tried,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first = tl.load(programs + tl.program_id(0))
    end = tl.load(programs + count + tl.program_id(0))
    costs += tl.load(programs + 2 * count + tl.program_id(0)) * size
    r = first + tl.arange(0, ROWS)
    inside = r < end
    j = tl.arange(0, SIZE)
    place = j.to(tl.int64)[:, None] * step + r[None, :]
    x = tl.load(values + place, mask=(j < size)[:, None] & inside[None, :], other=0.0)
    cost = tl.load(costs + j, mask=j < size, other=0.0)[:, None]
    weighted = x * cost
    largest = tl.max(tl.abs(x), axis=0)
    best = tl.zeros((ROWS,), tl.float32)
    chosen = largest
    lowest = tl.load(numbers)
    for i in range(tried):
        scale = largest * tl.load(ratios + i)
        inverse = tl.where(scale == 0, 0.0, tl.div_rn(1.0, scale))
        relative = x * inverse[None, :]
        rounded = tl.zeros((SIZE, ROWS), tl.float32) + lowest
        for k in range(15):
            rounded = tl.where(relative > tl.load(thresholds + k), tl.load(numbers + k + 1), rounded)
        along = tl.sum(rounded * weighted, axis=0)
        energy = tl.sum(rounded * rounded * cost, axis=0)
        one_over = tl.where(energy == 0, 0.0, tl.div_rn(1.0, energy))
        gain = along * along * one_over
        is_better = (gain > best) & (along > 0)
        best = tl.where(is_better, gain, best)
        chosen = tl.where(is_better, along * one_over, chosen)
    tl.store(found + r, chosen, mask=inside)


def best_scales(values: Tensor, costs: Tensor, widths: tuple[int, ...], grid: Grid) -> Tensor:
    """What `rounding.best_scales` gives, but for the order in which sums are taken."""
    size, rows = values.shape
    assert values.stride(1) == 1 or rows == 1
    found = torch.empty(rows, dtype=torch.float32, device=values.device)
    programs, ratios = _programs(widths, values.device), _ratios(values.device)
    with torch.cuda.device_of(values):
        _search[(programs.shape[1],)](
            values, values.stride(0), costs.contiguous(), grid.values, grid.thresholds, ratios, found,
            programs, programs.shape[1], size, len(ratios), SIZE=max(16, triton.next_power_of_2(size)),
            ROWS=ROWS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return found


@lru_cache(maxsize=64)
def _programs(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """(3, programs) int32: the first row of each program, the end of its layer's rows, and its layer."""
    found, start = [], 0
    for layer, width in enumerate(widths):
        found += [(first, start + width, layer) for first in range(start, start + width, ROWS)]
        start += width
    return torch.tensor(found, dtype=torch.int32).T.contiguous().to(device)


@cache
def _ratios(device: torch.device) -> Tensor:
    return torch.tensor(RATIOS, dtype=torch.float32, device=device)
