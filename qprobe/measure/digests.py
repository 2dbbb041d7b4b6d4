"""Digests of all that a run measures: weights, processed inputs, and what else a processor can change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from qprobe.inputs.batch import Batch, full_text, tokenizer_of
from qprobe.records import Sample

CHUNK = 2**21  # elements that are summed at once
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIX = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as a signed number


def weights_digest(
    model: Any, device: torch.device, release: Callable[[Tensor], None] = lambda _: None
) -> str:
    """SHA-256 over sums of every bit of every parameter and every stored buffer; one read of the memory.

    Each element's bits, times an odd number that depends on its place, are added modulo 2^64 in chunks: where
    one element of a chunk differs, so does its sum. device: where weights of the host are summed.
    release: called with each tensor once it was read.
    """
    sha = hashlib.sha256()
    sums: dict[torch.device, _Sums] = {}
    order: list[tuple[_Sums, int]] = []
    for name, tensor in _stored(model):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        place = tensor.device if tensor.device.type != "cpu" else device
        if place not in sums:
            sums[place] = _Sums(place)
        here = sums[place]
        order.append((here, here.add(tensor)))
        release(tensor)
    found = {id(one): iter(one.all()) for one in sums.values()}
    for one, count in order:
        for _ in range(count):
            sha.update(next(found[id(one)]).to_bytes(8, "little", signed=True))
    return sha.hexdigest()


def _stored(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what a checkpoint of `model` holds, tied tensors once, in order of the names."""
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


class _Sums:
    """Weighted sums of the bits of tensors on one device, copied from it all at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._weights = torch.empty(0, dtype=torch.int64, device=device)
        self._found: list[Tensor] = []

    def add(self, tensor: Tensor) -> int:
        """The number of sums that `tensor` gives."""
        flat = tensor.reshape(-1)
        chunks = flat.view(_BITS[flat.element_size()]).split(CHUNK)
        for chunk in chunks:
            wide = chunk.to(self._device).to(torch.int64)
            self._found.append((wide * self._first(len(wide))).sum())
        return len(chunks)

    def _first(self, count: int) -> Tensor:
        """The odd numbers of the first `count` places, made for the longest chunk so far."""
        if count > len(self._weights):
            most = min(CHUNK, 1 << (count - 1).bit_length())
            place = torch.arange(1, most + 1, device=self._device) * _MIX
            self._weights = (place ^ (place >> 29)) | 1
        return self._weights[:count]

    def all(self) -> list[int]:
        return torch.stack(self._found).tolist() if self._found else []


def inputs_digest(batch: Batch) -> str:
    """SHA-256 over the tensors that the processor made of a batch: changes when the processor does."""
    sha = hashlib.sha256()
    for key, value in sorted(batch.inputs.items()):
        sha.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        sha.update(value.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def reading_digest(processor: Any, samples: Iterable[Sample]) -> str:
    """SHA-256 over the settings of a processor's parts and the tokens of all texts of `samples`.

    What a processor does to any of the samples without an image being processed.
    """
    tokenizer = tokenizer_of(processor)
    parts = {name: vars(processor)[name] for name in sorted(vars(processor)) if name != "tokenizer"}
    settings = {name: part.to_dict() for name, part in parts.items() if hasattr(part, "to_dict")}
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for sample in samples:
        sha.update(json.dumps(tokenizer(full_text(processor, sample))["input_ids"]).encode())
    return sha.hexdigest()
