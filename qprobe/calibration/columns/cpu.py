"""The loop of `rounding.py` over columns for a CPU, compiled by Numba.

PyTorch takes longer to start an operation than to do it where a column has a few hundred numbers, and the
sweeps over a model of 135M parameters round two million columns. Rows do not know of each other: a thread has
some of them, `TOGETHER` at a time, whose errors stay in the first-level cache while all columns are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from qprobe.calibration.columns.grid import Grid

TOGETHER = 64  # rows
ALONE = 2**14  # numbers that one thread has rounded before another one has begun
best_scales = None  # one candidate is tried for all blocks at once: PyTorch is quick at that

_Compiled = Callable[[Callable[..., None]], Callable[..., None]]


def _compiled(*types: str) -> _Compiled:
    """Compiled when it is defined, or read from Numba's cache; it may run beside other Python threads.

    types: of its arguments, as Numba writes them.
    """
    signature = f"void({', '.join(types)})"

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        compiler: Any = partial(numba.njit, signature, nogil=True, error_model="numpy")
        try:
            return compiler(cache=True)(function)
        except Exception:  # no folder or disk space for a cache, or its files are cut: errors of many kinds
            return compiler()(function)

    return decorate


_MATRIX, _NUMBERS = "float32[:, :]", "float32[:]"


@_compiled(*[_MATRIX] * 4, *[_NUMBERS] * 2, "int32[:, ::1]", "float32[:, ::1]", "int64", "int64")
def _round(
    base: Any, own: Any, scales: Any, coupling: Any, values: Any, thresholds: Any, codes: Any, errors: Any,
    begin: int, end: int,
) -> None:  # fmt: skip
    columns = base.shape[0]
    each = columns // scales.shape[0]
    found = np.empty((columns, TOGETHER), np.float32)
    target = np.empty(TOGETHER, np.float32)
    relative = np.empty(TOGETHER, np.float32)
    code = np.empty(TOGETHER, np.int32)
    for first in range(begin, end, TOGETHER):
        rows = min(TOGETHER, end - first)
        for i in range(columns):
            for r in range(rows):
                target[r] = base[i, first + r]
            for j in range(i):
                factor = coupling[i, j]
                for r in range(rows):
                    target[r] += factor * found[j, r]
            for r in range(rows):
                scale = scales[i // each, first + r]
                relative[r] = target[r] * (np.float32(1) / scale) if scale != 0 else np.float32(0)
                code[r] = 0
            for k in range(thresholds.shape[0]):
                limit = thresholds[k]
                for r in range(rows):
                    code[r] += relative[r] > limit
            for r in range(rows):
                error = own[i, first + r] - values[code[r]] * scales[i // each, first + r]
                found[i, r] = error
                errors[i, first + r] = error
                codes[i, first + r] = code[r]


def round_columns(
    base: Tensor, own: Tensor, scales: Tensor, coupling: Tensor, widths: Sequence[int], grid: Grid
) -> tuple[Tensor, Tensor]:
    """What `rounding.round_columns` gives, but for the order of sums; `base` stays as it is."""
    assert len(base) % len(scales) == 0
    codes, errors = torch.empty(own.shape, dtype=torch.int32), torch.empty(own.shape)
    given = [x.numpy() for x in (base, own, scales)]
    fixed = [x.numpy() for x in (grid.values, grid.thresholds, codes, errors)]
    _in_threads(
        partial(_round, *given, coupling[layer].numpy(), *fixed, begin, end)
        for layer, begin, end in _parts(widths, len(base))
    )
    return codes, errors


def _parts(widths: Sequence[int], columns: int) -> Iterator[tuple[int, int, int]]:
    """(layer, first row, its end): the rows of each layer, cut for as many threads as PyTorch has."""
    threads = torch.get_num_threads()
    fewest = -(-ALONE // columns)
    start = 0
    for layer, width in enumerate(widths):
        step = max(-(-width // threads), fewest)
        step = -(-step // TOGETHER) * TOGETHER
        for first in range(start, start + width, step):
            yield layer, first, min(first + step, start + width)
        start += width


def _in_threads(calls: Iterator[Callable[[], None]]) -> None:
    """Run `calls`, side by side where there are several."""
    waiting = list(calls)
    if len(waiting) == 1 or torch.get_num_threads() == 1:
        for call in waiting:
            call()
        return
    with ThreadPoolExecutor(min(len(waiting), torch.get_num_threads())) as pool:
        for done in [pool.submit(call) for call in waiting]:
            done.result()
