"""KL divergence on answer tokens: the measure of damage that counts.

KL(p_ref || p) = sum over the vocabulary of p_ref (log p_ref - log p), in nats, at the positions that
predict an answer token; sums and token counts are kept so that means are taken once, at the end.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprobe.inputs.batch import Batch
from qprobe.measure.dequantized import DequantizedWeights
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.outputs import run_model


@dataclass(frozen=True)
class KlSums:
    """Sums over the answer tokens of one sample: KL in nats, tokens, tokens with the same top-1 choice."""

    kl: float
    tokens: int
    top1_agree: int


def answer_logits(model: Any, batch: Batch) -> list[Tensor]:
    """For each sample the logits that predict its answer tokens: (answer tokens, vocabulary) float32.

    Differentiable. A sample without an answer gives an empty tensor.
    """
    length = batch.inputs["input_ids"].shape[1]
    starts = [start for start, end in batch.answers if end > start]
    first = max(min(starts, default=length) - 1, 0)
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = length - first
    return at_answers(run_model(model, batch, **options).logits, batch)


def at_answers(logits: Tensor, batch: Batch) -> list[Tensor]:
    """The rows of `logits` (samples, last positions, vocabulary) that predict answer tokens, as float32.

    One tensor (answer tokens, vocabulary) a sample; empty for a sample without an answer.
    """
    offset = batch.kinds.shape[1] - logits.shape[1]  # 0 where the model computed all positions
    return [
        logits[i, start - 1 - offset : end - 1 - offset].float() if end > start else logits[i, :0].float()
        for i, (start, end) in enumerate(batch.answers)
    ]


def kl_per_sample(reference: list[Tensor], other: list[Tensor]) -> Tensor:
    """(samples,) KL(reference || other) summed over answer tokens, nats, float64; differentiable."""
    return torch.stack([_kl(p, q).double().sum() for p, q in zip(reference, other, strict=True)])


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    """(tokens,) KL at each position."""
    log_p = F.log_softmax(reference, dim=-1)
    log_q = F.log_softmax(other, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def kl_sums(reference: list[Tensor], other: list[Tensor]) -> list[KlSums]:
    """`KlSums` of each sample of a batch, from `answer_logits` of both models."""
    sums = kl_per_sample(reference, other).tolist()
    agree = [int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum()) for p, q in zip(reference, other, strict=True)]
    return [KlSums(kl, len(p), same) for kl, p, same in zip(sums, reference, agree, strict=True)]


def in_four_bit(
    modules: dict[str, nn.Linear], dequantized: DequantizedWeights, names: frozenset[str]
) -> AbstractContextManager[None]:
    """While open, the linears `names` compute with their 4-bit weights and all others as they are."""
    if not names:
        return nullcontext()
    chosen = {name: modules[name] for name in modules if name in names}
    return replaced_forwards(
        chosen, lambda name, module, x: F.linear(x, dequantized.weight(name), module.bias)
    )
