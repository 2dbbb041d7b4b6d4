"""The columns of `qprobe.calibration.columns` in one kernel, in Triton, which comes with PyTorch for CUDA.

A program has 32 rows, a thread each, and keeps their errors in registers; nothing passes between threads. The
loop over columns would launch five small kernels a column, of which an 11B model has four million.
"""

# Triton is no dependency of ours: where it is missing, nothing imports this module.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qprobe.calibration.columns import Grid

ROWS = 32  # a warp


@triton.jit
def _round(
    base, base_step, own, own_step, scales, scales_step, coupling, values, thresholds, codes, errors, rows,
    width, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    j = tl.arange(0, WIDTH)
    k = tl.arange(0, 16)
    limits = tl.load(thresholds + k, mask=k < 15, other=float("inf"))
    found = tl.zeros((WIDTH, ROWS), tl.float32)
    for i in range(width):
        factors = tl.load(coupling + i * width + j, mask=j < i, other=0.0)
        target = tl.load(base + i * base_step + r, mask=inside, other=0.0)
        target += tl.sum(factors[:, None] * found, axis=0)
        scale = tl.load(scales + i * scales_step + r, mask=inside, other=0.0)
        relative = tl.where(scale == 0, 0.0, target * tl.div_rn(1.0, scale))
        code = tl.sum((relative[None, :] > limits[:, None]).to(tl.int32), axis=0)
        error = tl.load(own + i * own_step + r, mask=inside, other=0.0) - tl.load(values + code) * scale
        found = tl.where(j[:, None] == i, error[None, :], found)
        tl.store(codes + i * rows + r, code, mask=inside)
        tl.store(errors + i * rows + r, error, mask=inside)


def fused(base: Tensor, own: Tensor, scales: Tensor, coupling: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """What `qprobe.calibration.columns.round_columns` gives; `base` stays as it is."""
    width, rows = base.shape
    assert base.stride(1) == own.stride(1) == scales.stride(1) == 1 or rows == 1
    codes = torch.empty((width, rows), dtype=torch.int32, device=base.device)
    errors = torch.empty((width, rows), dtype=torch.float32, device=base.device)
    with torch.cuda.device(base.device):  # Triton launches on the current one
        _round[(triton.cdiv(rows, ROWS),)](
            base, base.stride(0), own, own.stride(0), scales, scales.stride(0), coupling.contiguous(),
            grid.values, grid.thresholds, codes, errors, rows, width,
            WIDTH=max(16, triton.next_power_of_2(width)), ROWS=ROWS, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, errors
