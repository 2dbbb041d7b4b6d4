"""Fused weights of experts whose codes are chosen expert by expert, and stored as one weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qprobe.calibration.codes import (
    Readers,
    Rounded,
    calibrate_together,
    quantization_state,
    workspace_bytes,
)
from qprobe.calibration.gptq import output_error, shrunk
from qprobe.calibration.gram import Gram
from qprobe.formats.nf4 import Nf4, StoredNf4
from qprobe.measure.subject import Subject
from qprobe.records import Linear

FEWEST_TOKENS = 32
"""Below it an expert is rounded to nearest. Of as few tokens nearly all correlations are shrunk away, so that
little could be gained, and what is left of them is chance."""

TRANSPOSED = "its experts lie transposed, along what they put out"
CROSSING = "blocks of weights reach from one expert into the next"
TOO_FEW = f"none of its experts read {FEWEST_TOKENS} tokens and gains by them"


@dataclass(frozen=True)
class RoundedExperts:
    """One fused weight after calibration.

    nearest: how many of its experts are rounded to nearest. tokens: that they read, each once per expert.
    """

    whole: Rounded
    nearest: int
    tokens: float


def why_not(layer: Linear, blocksize: int) -> str | None:
    """Why the fused weight `layer` cannot be calibrated expert by expert; None if it can."""
    if layer.transposed:
        return TRANSPOSED
    return CROSSING if layer.in_features * layer.out_features % blocksize else None


def rounded_experts(
    subject: Subject, name: str, grams: Sequence[Gram], fmt: Nf4, limit_bytes: int
) -> RoundedExperts:
    """The weight `name`, each expert rounded for the tokens that it read.

    grams: of each expert. Scales are found expert by expert, and doubly quantized as those of one weight.
    limit_bytes: for experts that are rounded side by side; on a CPU each is alone.
    """
    tokens = sum(gram.tokens for gram in grams)
    own, plain = subject.dequantized.own(name), replace(fmt, double_quant=False)
    found: dict[int, Rounded] = {}
    enough = [expert for expert, gram in enumerate(grams) if gram.tokens >= FEWEST_TOKENS]
    with torch.no_grad():
        for some in _side_by_side(enough, own, limit_bytes):
            readers = [Readers([own[e]], grams[e].total, grams[e].tokens) for e in some]
            for expert, (one,) in zip(some, calibrate_together(readers, plain), strict=True):
                found[expert] = one
        chosen = {expert: one.stored for expert, one in found.items() if one.stored is not None}
        if not chosen:
            return RoundedExperts(Rounded(None, why=TOO_FEW), len(grams), tokens)
        whole = _whole(own, chosen, plain, fmt)
        share = _error(own, whole, {expert: grams[expert] for expert in chosen}, fmt)
    damping = max(one.damping or 0.0 for one in found.values())
    if not share < 1:
        why = "calibration does not lessen its error"
        return RoundedExperts(Rounded(None, share, damping, why), len(grams), tokens)
    return RoundedExperts(Rounded(whole, share, damping), len(grams) - len(chosen), tokens)


def _side_by_side(experts: Sequence[int], own: Tensor, limit_bytes: int) -> Iterator[Sequence[int]]:
    """`experts` in runs that are rounded together."""
    _, out_features, in_features = own.shape
    size = 1
    if own.device.type != "cpu":
        one = workspace_bytes(out_features, in_features)
        size = max(1, limit_bytes // one)
    return (experts[i : i + size] for i in range(0, len(experts), size))


def _whole(own: Tensor, chosen: dict[int, StoredNf4], plain: Nf4, fmt: Nf4) -> StoredNf4:
    """All experts as one stored weight: those `chosen`, and the others rounded to nearest."""
    parts = [chosen.get(expert) or plain.stored(weight) for expert, weight in enumerate(own)]
    scales = torch.cat([one.state.absmax for one in parts])
    return StoredNf4(
        torch.cat([one.codes for one in parts]), quantization_state(scales, own.shape, own.dtype, fmt)
    )


def _error(own: Tensor, whole: StoredNf4, grams: dict[int, Gram], fmt: Nf4) -> float:
    """Squared output errors of calibrated experts as a share of those of rounding to nearest."""
    sums = [0.0, 0.0]
    for place, weight_hat in enumerate((whole.packed().unpack(), fmt.pack(own).unpack())):
        for expert, gram in grams.items():
            error = (weight_hat[expert].float() - own[expert].float()).T.contiguous()
            sums[place] += float(output_error(error, shrunk(gram.total, gram.tokens)).double().sum())
    return sums[0] / sums[1] if sums[1] > 0 else float("nan")
