"""Slow, obvious oracles: plain loops in float64, one sample at a time, no code of qprobe's measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from qprobe.records import Sample
from tests.reading import encode


def log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    norm = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - norm for x in logits]


def kl(reference: Sequence[float], other: Sequence[float]) -> float:
    """KL(softmax(reference) || softmax(other)) in nats."""
    pairs = zip(log_softmax(reference), log_softmax(other), strict=True)
    return math.fsum(math.exp(p) * (p - q) for p, q in pairs)


def answer_logits(model: Any, processor: Any, sample: Sample) -> list[list[float]]:
    """The logits before each answer token, from one plain forward over the whole sequence."""
    batch = encode(processor, [sample], model.dtype)
    with torch.no_grad():
        logits = model(**batch.inputs).logits[0].double().tolist()
    (start, end) = batch.answers[0]
    return [logits[position - 1] for position in range(start, end)]


def mean_kl(reference: list[list[list[float]]], other: list[list[list[float]]]) -> float:
    """Mean KL over all answer tokens of all samples; [sample][token][vocabulary]."""
    values = [
        kl(p, q)
        for sample_p, sample_q in zip(reference, other, strict=True)
        for p, q in zip(sample_p, sample_q, strict=True)
    ]
    return math.fsum(values) / len(values)


def top1_agreement(reference: list[list[list[float]]], other: list[list[list[float]]]) -> float:
    """Share of answer tokens whose most probable token is the same."""
    same = [
        p.index(max(p)) == q.index(max(q))
        for sample_p, sample_q in zip(reference, other, strict=True)
        for p, q in zip(sample_p, sample_q, strict=True)
    ]
    return sum(same) / len(same)
