"""NF4 weights whose codes and scales are chosen for a layer's outputs, in bitsandbytes' own layout.

The order matters, because a double-quantized scale is not known before all scales of a weight are:
    1. a first sweep over the columns finds a scale for each block of 64;
    2. the scales are double-quantized as bitsandbytes does it, and read back;
    3. a second sweep chooses every code against the scales that were read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from qprobe.formats.gptq import (
    DAMPING,
    Metric,
    choose_codes,
    metric_of,
    output_error,
    scales_at_turn,
    scales_of_blocks,
)
from qprobe.formats.nf4 import Nf4, StoredNf4
from qprobe.formats.sizes import NESTED_BLOCKSIZE

ZERO_CODE = 7  # the code of 0.0, with which bitsandbytes fills the last byte of an odd weight


@dataclass(frozen=True)
class Rounded:
    """One weight after calibration.

    stored: None where the weight is to be rounded to nearest, and then `why` says so; "" otherwise.
    error: sum of squared output errors on the calibration inputs as a share of that of rounding to nearest,
    None where it is not known. damping: that the Gram matrix took, None without a metric.
    """

    stored: StoredNf4 | None
    error: float | None = None
    damping: float | None = None
    why: str = ""


def calibrate(
    weights: Sequence[Tensor], gram: Tensor, fmt: Nf4, damping: float = DAMPING
) -> tuple[Rounded, ...]:
    """The weights of layers that read the same inputs, rounded for their outputs on these inputs.

    weights: (out_features, in_features) each, in one dtype; gram: (in_features, in_features) X^T X over the
    tokens X, on the weights' device. A weight is left to rounding to nearest where `gram` has no metric (see
    `metric_of`), where it is not finite itself, or where calibration does not lessen the error.
    """
    gram = gram.float()
    metric = metric_of(gram, damping)
    if metric is None:
        return tuple(Rounded(None, why=_why_no_metric(gram)) for _ in weights)
    columns = [w.detach().float().T.contiguous() for w in weights]
    scales = _scales(columns, metric, fmt.blocksize)
    states = [_state(s, w, fmt) for s, w in zip(scales, weights, strict=True)]
    read_back = [_by_weight(StoredNf4(w, state), w) for state, w in zip(states, weights, strict=True)]
    codes = choose_codes(torch.cat(columns, dim=1), torch.cat(read_back, dim=1), metric)
    del read_back
    parts = codes.split([w.shape[0] for w in weights], dim=1)
    found = [StoredNf4(packed_codes(c.T), state) for c, state in zip(parts, states, strict=True)]
    return tuple(_judged(w, one, gram, metric, fmt) for w, one in zip(weights, found, strict=True))


def _why_no_metric(gram: Tensor) -> str:
    if not bool(torch.isfinite(gram).all()):
        return "its inputs are not finite"
    return "its inputs are all zero" if not bool(gram.any()) else "the Gram matrix of its inputs is singular"


def _scales(columns: Sequence[Tensor], metric: Metric, blocksize: int) -> list[Tensor]:
    """The block scales of each weight before double quantization, (blocks,) in the order of the weight."""
    if len(columns[0]) % blocksize:
        return [scales_of_blocks(w, metric, blocksize) for w in columns]
    found = scales_at_turn(torch.cat(list(columns), dim=1), metric, blocksize)
    return [part.reshape(-1) for part in found.split([w.shape[1] for w in columns])]


def _state(scales: Tensor, weight: Tensor, fmt: Nf4) -> object:
    """The quantization state of `weight` with these block scales, as bitsandbytes' quantize_4bit makes it."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    plain = {
        "shape": weight.shape,
        "dtype": weight.dtype,
        "blocksize": fmt.blocksize,
        "code": get_4bit_type("nf4", device=weight.device),
        "quant_type": "nf4",
    }
    if not fmt.double_quant:
        return QuantState(absmax=scales, **plain)
    offset = scales.mean()
    nested, state2 = quantize_blockwise(scales - offset, blocksize=NESTED_BLOCKSIZE)
    return QuantState(absmax=nested, offset=offset, state2=state2, **plain)


def _by_weight(stored: StoredNf4, weight: Tensor) -> Tensor:
    """(in_features, out_features): the scale of each weight as it is read back."""
    absmax, blocksize = stored.packed().state.absmax, stored.state.blocksize
    flat = absmax.repeat_interleave(blocksize)[: weight.numel()]
    return flat.view(weight.shape).T.contiguous()


def packed_codes(codes: Tensor) -> Tensor:
    """(ceil(n / 2), 1) uint8: codes (out_features, in_features) two a byte, the first in the upper half."""
    flat = codes.reshape(-1)
    even = F.pad(flat, (0, flat.numel() % 2), value=ZERO_CODE)
    return (even[0::2] << 4 | even[1::2]).unsqueeze(1)


def _judged(weight: Tensor, stored: StoredNf4, gram: Tensor, metric: Metric, fmt: Nf4) -> Rounded:
    """`stored`, unless rounding to nearest gives outputs as good."""
    if not bool(torch.isfinite(weight).all()):
        return Rounded(None, damping=metric.damping, why="its weights are not finite")
    nearest, calibrated = (
        float(output_error((packed.unpack().float() - weight.float()).T.contiguous(), gram).double().sum())
        for packed in (fmt.pack(weight), stored.packed())
    )
    share = calibrated / nearest if nearest > 0 else float("nan")
    if not isfinite(share) or share >= 1:
        known = share if isfinite(share) else None
        return Rounded(None, known, metric.damping, "calibration does not lessen its error")
    return Rounded(stored, share, metric.damping)
