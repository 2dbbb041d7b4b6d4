"""Seconds of a scan, from the products that its passes compute and from how fast this device computes them.

A bare forward pass is counted in floating point operations; stages are multiples of it, as measured at full
size (reports/full-size, reports/calibration). So are the constants here: each names what it was taken from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import ceil, prod

import torch
from torch import nn

from qprobe.calibration.planned.memory import BatchShape, blocks_of, chosen_experts
from qprobe.inputs.drawing import TOKENS
from qprobe.models.family import CROSS, VISION
from qprobe.records import Linear
from qprobe.scanning.drawn import AT_ONCE

EFFICIENCY = 0.4  # of the speed of large products: a bare forward of 32 images of an 11B in 2.62 s on an H200
LAYER_S = 3e-5  # to launch a linear and what follows it, where the products are small
MEASURE = 10  # bare forwards of a calibration sample, its share of the isolated KL included
LISTS, LIST = 13, 1.15  # candidates and points of the frontier; bare forwards of one in 4-bit
START_S = 6.0  # imports of the libraries, while loading
READ = 3e9  # bytes/s of files that the system has in memory, or of a fast disk
PACK_S, PREPARE_S, FIRST_S, REPORT_S = 2.0, 2.0, 5.0, 5.0  # on CUDA: library kernels are read when first used
TRIED = 3  # bare forwards of a batch that prepare runs
GATHER = 12  # bare forwards of a calibration sample: weights of tokens, the decision on them, one walk
ROUND, DECIDE = 0.06, 0.25  # of the speed of float32 products; of all layers, rounded twice for the decision
WRITE = 0.28e9  # bytes/s of codes written, joined, hashed and read back
STEP = 4  # launches of a linear that a step of drawing takes as long as, by what answers take
TUNE = 5  # bare forwards of a batch of a step
LOCK = 1.3e9  # bytes/s of host memory that is page-locked
LONG_ENOUGH_S, LARGEST = 0.01, 8192  # of a product that is timed, and of its matrices
COPIED = 2.3  # times that all 16-bit weights are copied for a batch, where they wait on the host


@dataclass(frozen=True)
class Rates:
    """How fast a device computes and copies. products, products32: FLOP/s in the path's dtype and in float32.

    copies: bytes/s from the host; None where there is nothing to copy.
    """

    products: float
    products32: float
    copies: float | None = None


@dataclass(frozen=True)
class Work:
    """What a scan runs. calibration, held_out: samples. shape: of a batch. tune: steps; None where codes are
    not calibrated. stored_bytes: of 16-bit weights; four_bit_bytes: of their other form.
    """

    calibration: int
    held_out: int
    shape: BatchShape
    tune: int | None
    stored_bytes: int
    four_bit_bytes: int
    is_streamed: bool
    drawn_texts: int = 0

    @property
    def batches(self) -> int:
        """Of all passes over samples."""
        size = self.shape.samples
        return ceil(self.calibration / size) + ceil(self.calibration / 2 / size) + ceil(self.held_out / size)


def seconds_of(
    model: nn.Module, layers: list[Linear], work: Work, rates: Rates, is_cuda: bool
) -> dict[str, float]:
    """Seconds by stage, as `scan --json` names them."""
    once = 1.0 if is_cuda else 0.0
    bare = flops_of(model, layers, work.shape) / (EFFICIENCY * rates.products) + LAYER_S * len(layers)
    each = bare / work.shape.samples
    found = {
        "load": START_S + work.stored_bytes / READ,
        "weights": once * PACK_S,
        "prepare": once * PREPARE_S + TRIED * bare,
    }
    if work.tune is not None:
        rounding = rounding_flops(layers) / (ROUND * rates.products32)
        fitting = GATHER * each * work.calibration
        found["calibrate"] = (1 + DECIDE) * rounding + fitting + work.four_bit_bytes / WRITE
        found["calibrate"] += work.tune * TUNE * bare
        found["calibrate"] += _drawing_s(model, layers, work, rates)
    found["measure"] = once * FIRST_S + MEASURE * each * work.calibration
    lists = LISTS + (2 if work.tune is not None else 0)
    found["choose"] = (lists * LIST + 1) * each * work.held_out
    found["report"] = REPORT_S
    if work.is_streamed and rates.copies is not None:
        found["weights"] += (work.stored_bytes + work.four_bit_bytes) / LOCK
        found["measure"] += COPIED * work.stored_bytes * work.batches / rates.copies
    return found


def _drawing_s(model: nn.Module, layers: list[Linear], work: Work, rates: Rates) -> float:
    """Seconds of drawing texts and of fitting codes to them, as to calibration samples."""
    each = flops_of(model, layers, BatchShape(1, TOKENS, TOKENS)) / (EFFICIENCY * rates.products)
    step = STEP * LAYER_S * len(layers)
    if work.is_streamed and rates.copies is not None:
        step += work.stored_bytes / rates.copies
    return ceil(work.drawn_texts / AT_ONCE) * TOKENS * step + (1 + GATHER) * each * work.drawn_texts


def flops_of(model: nn.Module, layers: Iterable[Linear], shape: BatchShape) -> float:
    """Floating point operations of a forward pass of a batch: products of linears, and attention."""
    every = list(layers)
    experts = chosen_experts(model)
    linears = 0.0
    for x in every:
        rows = shape.samples * shape.rows_read(x)
        linears += 2.0 * rows * x.out_features * x.in_features * (experts if x.experts else 1)
    return linears + sum(_attention(members, shape) for members in blocks_of(model, every).values())


def _attention(layers: list[Linear], shape: BatchShape) -> float:
    """Of one block: scores and their sums over values, of all pairs of rows of a sample."""
    first = layers[0]
    if first.tower == VISION:
        pairs = shape.vision_rows**2
    else:
        reads = shape.vision_rows if any(x.tower == CROSS for x in layers) else shape.tokens
        pairs = shape.tokens * reads
    return 4.0 * shape.samples * pairs * first.in_features


def rounding_flops(layers: Iterable[Linear]) -> float:
    """Of the updates of one sweep of GPTQ over all layers."""
    return sum(2.0 * prod(x.shape[:-1]) * x.in_features**2 for x in layers if not x.fixed)


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """`Rates` of this device right now, from products that take a fraction of a second.

    dtype: in which the path is walked.
    """
    products = {x: _product_rate(device, x) for x in {dtype, torch.float32}}
    copies = _copy_rate(device) if device.type == "cuda" else None
    return Rates(products[dtype], products[torch.float32], copies)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size, seconds = 128, 0.0
    while seconds < LONG_ENOUGH_S and size < LARGEST:
        size *= 2
        a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = _fastest(device, partial(torch.matmul, a, b))
    return 2.0 * size**3 / seconds


def _copy_rate(device: torch.device) -> float:
    held = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    return held.nbytes / _fastest(device, lambda: held.to(device, non_blocking=True))


def _fastest(device: torch.device, work: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of several calls, the first of which warms up."""
    found = []
    for _ in range(times):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
