"""NF4 weights whose codes and scales are chosen for a layer's outputs, in bitsandbytes' own layout.

The order matters, because a double-quantized scale is not known before all scales of a weight are:
    1. sweeps over the columns find a scale for each block of 64, and codes to go with it;
    2. the scales are double-quantized as bitsandbytes does it, and read back;
    3. a last sweep chooses every code again, against the scales that were read back.
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
    choose_codes,
    fitted_scales,
    improved_codes,
    is_finite,
    metric_of,
    output_error,
    scales_at_turn,
    scales_of_blocks,
    shrunk,
)
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


def calibrate(
    weights: Sequence[Tensor], gram: Tensor, tokens: int, fmt: Nf4, damping: float = DAMPING
) -> tuple[Rounded, ...]:
    """The weights of layers that read the same inputs, rounded for their outputs on these inputs.

    weights: (out_features, in_features) each, in one dtype; gram: (in_features, in_features) X^T X over the
    tokens X, on the weights' device; tokens: how many those are, by which it is shrunk (see `shrunk`). A
    weight is left to rounding to nearest where `gram` has no metric (see `metric_of`), where it is not finite
    itself, or where calibration does not lessen the error under the shrunk matrix.
    """
    metric = metric_of(shrunk(gram, tokens), damping)
    if metric is None:
        return tuple(Rounded(None, why=_why_no_metric(gram)) for _ in weights)
    together = _side_by_side(weights)
    raw, codes = _first_sweep(together, [w.shape[0] for w in weights], metric, fmt.blocksize)
    states = [quantization_state(s, w.shape, w.dtype, fmt) for s, w in zip(raw, weights, strict=True)]
    read_back = _spread([_absmax(s) for s in states], together, [w.shape[0] for w in weights], fmt.blocksize)
    codes = improved_codes(together, read_back, codes, metric)
    del together, read_back
    parts = codes.split([w.shape[0] for w in weights], dim=1)
    found = [StoredNf4(packed_codes(c.T), state) for c, state in zip(parts, states, strict=True)]
    return tuple(_judged(w, one, metric, fmt) for w, one in zip(weights, found, strict=True))


def workspace_bytes(out_features: int, in_features: int) -> int:
    """The most bytes that `calibrate` holds at once beside its arguments, for `out_features` rows in all.

    First the shrunk Gram matrix and, while it is factorized, two more; then it, its factor, and of each
    weight itself, its scale, its error (float32) and two codes, with what a few columns need on the way.
    """
    matrix = 4 * in_features**2
    weights = (3 * 4 + 2) * out_features * in_features
    on_the_way = 8 * 4 * max(WIDTH * out_features, BLOCKS * 64)
    return max(3 * matrix, 2 * matrix + weights + on_the_way)


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
    together: Tensor, widths: Sequence[int], metric: Metric, blocksize: int
) -> tuple[list[Tensor], Tensor]:
    """(scales, codes): the block scales of each weight before double quantization, and codes to start from.

    together: the weights, `widths` rows of each, (in_features, rows). scales: (blocks,) each in the order of
    the weight.
    """
    if len(together) % blocksize:
        raw = [scales_of_blocks(w, metric, blocksize) for w in together.split(list(widths), dim=1)]
        spread = _spread(raw, together, widths, blocksize)
        return raw, improved_codes(together, spread, choose_codes(together, spread, metric), metric)
    # Blocks keep to their rows: scales can follow the errors so far, and be fitted to the codes at the end.
    found, codes = scales_at_turn(together, metric, blocksize)
    spread = found.T.repeat_interleave(blocksize, dim=0)
    codes = improved_codes(together, spread, codes, metric)
    found = fitted_scales(together, spread, codes, metric, blocksize)
    return [part.reshape(-1) for part in found.split(list(widths))], codes


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


def _spread(scales: Sequence[Tensor], like: Tensor, widths: Sequence[int], blocksize: int) -> Tensor:
    """The scale of each weight of `like` (in_features, rows), `widths` rows of each layer.

    scales: for each layer those of its blocks.
    """
    spread = torch.empty_like(like)
    for part, absmax in zip(spread.split(list(widths), dim=1), scales, strict=True):
        n, rows = part.shape
        if n % blocksize == 0:
            part.unflatten(0, (-1, blocksize)).copy_(absmax.view(rows, -1).T.unsqueeze(1))
        else:
            part.copy_(absmax.repeat_interleave(blocksize)[: rows * n].view(rows, n).T)
    return spread


def packed_codes(codes: Tensor) -> Tensor:
    """(ceil(n / 2), 1) uint8: codes (out_features, in_features) two per byte, the first in the upper half."""
    flat = codes.reshape(-1)
    even = F.pad(flat, (0, flat.numel() % 2), value=ZERO_CODE)
    return (even[0::2] << 4 | even[1::2]).unsqueeze(1)


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
