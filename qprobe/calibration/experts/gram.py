"""Gram matrices of fused experts: of each expert, over the tokens that are routed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from qprobe.calibration.gram import Gram, gram_bytes, gram_dtype
from qprobe.inputs.batch import PAD, Batch
from qprobe.measure.attribution import walking
from qprobe.measure.experts.routing import Product, Routed, times
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.outputs import run_model
from qprobe.measure.subject import Subject

Grams = dict[str, list[Gram]]
"""By fused weight the matrix of each of its experts, in their order."""


def gathered_experts(
    subject: Subject,
    names: Sequence[str],
    batches: Iterable[Batch],
    done: Callable[[], None] = lambda: None,
) -> Grams:
    """The matrices of the fused weights `names` over all `batches`, on the 16-bit model.

    batches: in the dtype of the subject's path. done: called after each. Padding does not count, and every
    token counts, as often as its batch, for each expert that reads it.
    """
    if subject.limit is not None:
        subject.limit.store.allow(0)  # matrices take the room of weights that could stay
    grams = {name: _empty(subject, name) for name in names}
    with walking(subject.path):
        for batch in batches:
            with subject.running(f"gram {names[0]}", batch.elements):
                _add(subject, grams, batch)
            done()
    return grams


def _empty(subject: Subject, name: str) -> list[Gram]:
    layer, device = subject.layers[name], subject.device_of(name)
    size = (layer.in_features, layer.in_features)
    return [
        Gram(torch.zeros(size, dtype=gram_dtype(device), device=device)) for _ in range(layer.experts or 0)
    ]


def _add(subject: Subject, grams: Grams, batch: Batch) -> None:
    """Run `batch` and add what each expert reads of it."""

    def forward(name: str, product: Product, x: Tensor) -> Tensor:
        if name in grams:
            assert isinstance(product, Routed), name
            counts = _counting(product, batch)
            for expert, rows in product.routing.spans():
                mask = None if counts is None else counts[product.routing.token[rows].cpu()]
                grams[name][expert].add(x[rows], mask, batch_weight=batch.weight)
        return times(product, x, subject.dequantized.own(name).to(x.dtype))

    with torch.no_grad(), replaced_forwards(subject.modules, forward):
        run_model(subject.model, batch)


def _counting(product: Routed, batch: Batch) -> Tensor | None:
    """(tokens,) on the CPU, False for padding; None where all count."""
    tokens = product.routing.tokens
    kinds = None if tokens % batch.size else batch.kinds_of(tokens // batch.size)
    return None if kinds is None or bool((kinds != PAD).all()) else (kinds != PAD).reshape(-1)


def at_once(subject: Subject, names: Sequence[str], limit_bytes: int) -> Iterator[list[str]]:
    """`names` in runs whose matrices fit `limit_bytes` together; never less than one."""
    part: list[str] = []
    room = 0
    for name in names:
        layer = subject.layers[name]
        size = (layer.experts or 0) * gram_bytes(layer.in_features, subject.device_of(name))
        if part and size > room:
            yield part
            part = []
        room = (room if part else limit_bytes) - size
        part.append(name)
    if part:
        yield part
