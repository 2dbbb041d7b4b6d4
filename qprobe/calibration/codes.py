"""NF4 weights whose codes and scales are chosen for a layer's outputs, in bitsandbytes' own layout.

The order matters, because a double-quantized scale is not known before all scales of a weight are:
    1. sweeps over the columns find a scale for each block of 64, and codes to go with it;
    2. the scales are double-quantized as bitsandbytes does it, and read back;
    3. a last sweep chooses every code again, against the scales that were read back;
    4. and one more under both Gram matrices, where that of the outputs' gradients is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qprobe.calibration.gptq import (
    BLOCKS,
    DAMPING,
    WIDTH,
    Metric,
    Metrics,
    choose_codes,
    fitted_scales,
    improve_codes,
    is_finite,
    metric_of,
    output_error,
    scales_at_turn,
    scales_of_blocks,
    shrunk,
)
from qprobe.calibration.two_sided import Sides, mixed, move_codes
from qprobe.formats.nf4 import Nf4, StoredNf4
from qprobe.registry.precisions import NESTED_BLOCKSIZE

ZERO_CODE = 7  # the code of 0.0, with which bitsandbytes fills the last byte of an odd weight


@dataclass(frozen=True)
class Rounded:
    """One weight after calibration.

    stored: None where the weight is to be rounded to nearest, and then `why` says so; "" otherwise.
    error: sum of squared output errors as a share of that of rounding to nearest, both under the Gram matrix
    of the calibration inputs, shrunk as for the fit; None where it is not known.
    damping: that the Gram matrix took, None without a metric.
    """

    stored: StoredNf4 | None
    error: float | None = None
    damping: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Readers:
    """The weights of layers that read the same inputs, and what those are.

    weights: (out_features, in_features) each, in one dtype; gram: (in_features, in_features) X^T X over the
    tokens X, on the weights' device; tokens: how many those are, by which it is shrunk (see `shrunk`).
    outputs: of each weight, (out_features, out_features) of the gradients at its outputs, or None (see
    `qprobe.calibration.two_sided`); empty for None of all.
    """

    weights: Sequence[Tensor]
    gram: Tensor
    tokens: float
    outputs: Sequence[Tensor | None] = ()

    @property
    def sides(self) -> list[Tensor | None]:
        """The matrices of `outputs` on the weights' device, `mixed`."""
        if not self.outputs:
            return [None] * len(self.weights)
        return [None if x is None else mixed(x.to(self.gram.device)) for x in self.outputs]

    @property
    def rows(self) -> int:
        return sum(len(w) for w in self.weights)


def calibrate(readers: Readers, fmt: Nf4, damping: float = DAMPING) -> tuple[Rounded, ...]:
    """The weights of `readers`, rounded for their outputs on these inputs; see `calibrate_together`."""
    return calibrate_together([readers], fmt, damping)[0]


def calibrate_together(
    readers: Sequence[Readers], fmt: Nf4, damping: float = DAMPING
) -> list[tuple[Rounded, ...]]:
    """The weights of each of `readers`, rounded for their outputs on these inputs.

    All have as many in_features, and lie on one device. Together they fill a GPU; each gets what it would get
    alone. A weight is left to rounding to nearest where its `gram` has no metric (see `metric_of`), where it
    is not finite itself, or where calibration does not lessen the error under the shrunk matrix.
    """
    metrics = [metric_of(shrunk(one.gram, one.tokens), damping) for one in readers]
    both = [(one, metric) for one, metric in zip(readers, metrics, strict=True) if metric is not None]
    found = iter(_together([one for one, _ in both], [metric for _, metric in both], fmt) if both else [])
    return [
        tuple(Rounded(None, why=_why_no_metric(one.gram)) for _ in one.weights)
        if metric is None
        else tuple(
            _judged(w, stored, metric, fmt) for w, stored in zip(one.weights, next(found), strict=True)
        )
        for one, metric in zip(readers, metrics, strict=True)
    ]


def _together(readers: Sequence[Readers], metrics: Sequence[Metric], fmt: Nf4) -> list[list[StoredNf4]]:
    """The weights of each of `readers` as they are stored after all sweeps."""
    weights = [w for one in readers for w in one.weights]
    heights = [len(w) for w in weights]
    joined = Metrics(tuple(metrics), tuple(one.rows for one in readers))
    side_by_side = _side_by_side(weights)
    raw, codes = _first_sweep(side_by_side, heights, joined, fmt.blocksize)
    states = [quantization_state(s, w.shape, w.dtype, fmt) for s, w in zip(raw, weights, strict=True)]
    read_back = _standing([_absmax(s) for s in states], weights, fmt.blocksize)
    improve_codes(side_by_side, read_back, codes, joined)
    sides = Sides(heights, [side for one in readers for side in one.sides])
    move_codes(side_by_side, read_back, codes, joined, sides)
    del side_by_side, read_back, sides
    parts = codes.split(heights, dim=1)
    stored = iter([StoredNf4(packed_codes(c.T), state) for c, state in zip(parts, states, strict=True)])
    return [[next(stored) for _ in one.weights] for one in readers]


def workspace_bytes(out_features: int, in_features: int, matrices: int = 1) -> int:
    """The most bytes that `calibrate_together` holds at once beside its arguments.

    out_features: rows in all; matrices: Gram matrices. First the shrunk Gram matrices and factors and, while
    the last one is factorized, one matrix more; then these and of each weight itself, its error (float32) and
    its code, with what a few columns need on the way.
    """
    matrix = 4 * in_features**2
    weights = (2 * 4 + 1) * out_features * in_features
    if in_features % 64:  # each weight has its scale beside it
        weights += 4 * out_features * in_features
    on_the_way = 7 * 4 * max(WIDTH * out_features, BLOCKS * 64)
    beside = out_features // matrices * in_features if matrices > 1 else 0  # codes of one weight once more
    return max((2 * matrices + 1) * matrix, 2 * matrices * matrix + weights + on_the_way + beside)


def _why_no_metric(gram: Tensor) -> str:
    if not is_finite(gram):
        return "its inputs are not finite"
    return "its inputs are all zero" if not bool(gram.any()) else "the Gram matrix of its inputs is singular"


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """(in_features, rows of all) float32: the transposed `weights`, (rows, in_features) each."""
    rows = sum(w.shape[0] for w in weights)
    together = torch.empty((weights[0].shape[1], rows), dtype=torch.float32, device=weights[0].device)
    for part, weight in zip(together.split([w.shape[0] for w in weights], dim=1), weights, strict=True):
        part.copy_(weight.detach().T)
    return together


def _first_sweep(
    weight: Tensor, heights: Sequence[int], metrics: Metrics, blocksize: int
) -> tuple[list[Tensor], Tensor]:
    """(scales, codes): the block scales of each weight before double quantization, and codes to start from.

    weight: all of them side by side, `heights` rows of each, (in_features, rows). scales: (blocks,) each in
    the order of the weight.
    """
    if len(weight) % blocksize:
        owners = [m for m, width in zip(metrics.each, metrics.widths, strict=True) for _ in range(width)]
        starts = [sum(heights[:i]) for i in range(len(heights))]
        parts = zip(weight.split(list(heights), dim=1), starts, strict=True)
        raw = [scales_of_blocks(part, owners[start], blocksize) for part, start in parts]
        straddling = _standing(raw, [part.T for part in weight.split(list(heights), dim=1)], blocksize)
        codes = choose_codes(weight, straddling, metrics)
        improve_codes(weight, straddling, codes, metrics)
        return raw, codes
    # Blocks keep to their rows: scales can follow the errors so far, and be fitted to the codes at the end.
    found, codes = scales_at_turn(weight, metrics, blocksize)
    improve_codes(weight, found, codes, metrics)
    found = fitted_scales(weight, found, codes, metrics, blocksize)
    return [part.T.reshape(-1) for part in found.split(list(heights), dim=1)], codes


def quantization_state(scales: Tensor, shape: torch.Size, dtype: torch.dtype, fmt: Nf4) -> Any:
    """The state of a weight with these block scales (blocks,), as bitsandbytes' quantize_4bit makes it."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    plain = {
        "shape": shape,
        "dtype": dtype,
        "blocksize": fmt.blocksize,
        "code": get_4bit_type("nf4", device=scales.device),
        "quant_type": "nf4",
    }
    if not fmt.double_quant:
        return QuantState(absmax=scales, **plain)
    offset = scales.mean()
    nested, state2 = quantize_blockwise(scales - offset, blocksize=NESTED_BLOCKSIZE)
    return QuantState(absmax=nested, offset=offset, state2=state2, **plain)


def _absmax(state: Any) -> Tensor:
    """(blocks,) the block scales of `state` as they are read back."""
    return StoredNf4(torch.empty(0), state).packed().state.absmax


def _standing(scales: Sequence[Tensor], weights: Sequence[Tensor], blocksize: int) -> Tensor:
    """The block scales of `weights` side by side, (k, rows), each for in_features / k columns in a row.

    scales: (blocks,) of each weight (out_features, in_features), in its order.
    """
    n, heights = weights[0].shape[1], [len(w) for w in weights]
    whole = n % blocksize == 0
    found = scales[0].new_empty(n // blocksize if whole else n, sum(heights))
    for absmax, rows, part in zip(scales, heights, found.split(heights, dim=1), strict=True):
        if not whole:  # blocks straddle rows
            absmax = absmax.repeat_interleave(blocksize)[: rows * n]
        part.copy_(absmax.view(rows, -1).T)
    return found


def packed_codes(codes: Tensor) -> Tensor:
    """(ceil(n / 2), 1) uint8: codes (out_features, in_features) two per byte, the first in the upper half."""
    flat = codes.reshape(-1)
    even = F.pad(flat, (0, flat.numel() % 2), value=ZERO_CODE)
    return (even[0::2] << 4 | even[1::2]).unsqueeze(1)


def unpacked_codes(packed: Tensor, count: int) -> Tensor:
    """(count,) uint8 codes of `packed_codes`, in the order of the weight."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:count]


def _judged(weight: Tensor, stored: StoredNf4, metric: Metric, fmt: Nf4) -> Rounded:
    """`stored`, unless rounding to nearest gives outputs as good."""
    if not bool(torch.isfinite(weight).all()):
        return Rounded(None, damping=metric.damping, why="its weights are not finite")
    nearest, calibrated = (
        float(
            output_error((packed.unpack().float() - weight.float()).T.contiguous(), metric.gram)
            .double()
            .sum()
        )
        for packed in (fmt.pack(weight), stored.packed())
    )
    share = calibrated / nearest if nearest > 0 else float("nan")
    if not isfinite(share) or share >= 1:
        known = share if isfinite(share) else None
        return Rounded(None, known, metric.damping, "calibration does not lessen its error")
    return Rounded(stored, share, metric.damping)
