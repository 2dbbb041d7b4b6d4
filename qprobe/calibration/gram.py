"""Gram matrices X^T X of what linears read, summed over the tokens of samples.

They are sums over tokens, so that sums of parts of the samples add up to those of all. Linears that read the
same tensor (q/k/v, gate/up, every cross-attention's k and v) share one matrix. Padding does not count: of
texts, and of images where the model leaves it out (see `tiles_that_count`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from qprobe.inputs.batch import PAD, Batch
from qprobe.measure.attribution import walking
from qprobe.measure.dequantized import DequantizedWeights
from qprobe.measure.experts.routing import Product, times
from qprobe.measure.hooks import LayerForward, replaced_forwards
from qprobe.measure.outputs import run_model
from qprobe.measure.subject import Subject
from qprobe.records import Linear

Weights = Callable[[str, int], Tensor | None]

# Why the sum that was gathered for a linear is not its own, where that is so on any batch.
APART = "it does not read the same tensor as its neighbours on every batch"
UNLIKE = "it read other tokens when they were weighed than when they were summed"


@dataclass(frozen=True)
class SharedInput:
    """Linears that read one tensor, in the order in which they run."""

    names: tuple[str, ...]
    in_features: int

    @property
    def leader(self) -> str:
        """The linear whose input is summed."""
        return self.names[0]


def gram_dtype(device: torch.device) -> torch.dtype:
    """Sums over batches are kept in float64 on the CPU, where that costs little, else in float32."""
    return torch.float64 if device.type == "cpu" else torch.float32


def gram_bytes(in_features: int, device: torch.device) -> int:
    """Bytes of one Gram matrix while it is summed."""
    return in_features**2 * gram_dtype(device).itemsize


@dataclass
class Gram:
    """The sum over the tokens seen so far. total: (in_features, in_features).

    tokens: how many, each as often as its batch counts.
    """

    total: Tensor
    tokens: float = 0

    def add(
        self, x: Tensor, mask: Tensor | None, weights: Tensor | None = None, batch_weight: float = 1.0
    ) -> None:
        """Add the tokens of `x` (..., in_features).

        mask: (tokens,) on the CPU, True for those that count. weights: (tokens,) what each counts; None: 1.
        batch_weight: of all of them, see `Batch`.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if batch_weight != 1:
            weights = batch_weight * (torch.ones(len(rows)) if weights is None else weights)
        if mask is not None:
            rows = torch.where(mask.to(rows.device)[:, None], rows, 0.0)
        self.tokens += batch_weight * (len(rows) if mask is None else int(mask.sum()))
        if rows.dtype == torch.bfloat16 and rows.is_cuda:
            parts = [rows] if weights is None else weighted_parts(rows, weights.to(rows.device))
            for part in parts:
                self.total += torch.mm(rows.T, part, out_dtype=torch.float32)
            return
        rows = rows.float()
        if weights is not None:
            rows = rows * weights.to(rows.device).sqrt()[:, None]
        if self.total.dtype == rows.dtype:
            self.total.addmm_(rows.T, rows)
        else:
            self.total += rows.T @ rows


def weighted_parts(rows: Tensor, weights: Tensor) -> list[Tensor]:
    """Two tensors of the 16-bit dtype of `rows` (tokens, n) whose sum is weights x rows within 2^-16 of it.

    Products of 16-bit numbers are exact in float32, and ten times as fast as of float32 ones on a GPU.
    """
    whole = rows.float() * weights[:, None]
    first = whole.to(rows.dtype)
    return [first, (whole - first.float()).to(rows.dtype)]


def shared_inputs(subject: Subject, batches: Iterable[Batch]) -> list[SharedInput]:
    """The quantized linears that run on the batches, by what they read, in execution order.

    Batches are run until every linear was seen, or all are. Fused experts are none of them, see
    `qprobe.calibration.experts`.
    """
    wanted = frozenset(x for x in subject.quantized if subject.layers[x].experts is None)
    survey = _Survey(wanted, subject.dequantized)
    for batch in batches:
        with subject.running("survey", batch.elements), walking(subject.path):  # many CPUs emulate bf16
            _run(subject, batch.in_dtype(subject.path.dtype), survey.forward)
        if len(survey.leaders) == len(wanted):
            break
    members: dict[str, list[str]] = {}
    for name, leader in survey.leaders.items():
        members.setdefault(leader, []).append(name)
    return [SharedInput(tuple(names), subject.modules[names[0]].in_features) for names in members.values()]


@dataclass
class _Survey:
    """Notes of each linear the first one that read the same tensor."""

    wanted: frozenset[str]
    dequantized: DequantizedWeights
    leaders: dict[str, str] = field(default_factory=dict)
    inputs: list[tuple[Any, int, str]] = field(default_factory=list)  # weak reference, version, leader

    def forward(self, name: str, product: Product, x: Tensor) -> Tensor:
        if name in self.wanted and name not in self.leaders:
            self.inputs = [one for one in self.inputs if one[0]() is not None]
            same = (n for seen, version, n in self.inputs if seen() is x and version == x._version)
            self.leaders[name] = leader = next(same, name)
            if leader == name:
                self.inputs.append((ref(x), x._version, name))
        return times(product, x, self.dequantized.own(name).to(x.dtype))


@dataclass
class Gathering:
    """Sums the Gram matrices of some shared inputs over batches.

    weights: what tokens count, by leader and number of the batch, (tokens,) or None for once each.
    apart: linears whose sum is not theirs, with the reason.
    batches: how many were added.
    """

    subject: Subject
    inputs: Sequence[SharedInput]
    weights: Weights | None = None
    grams: dict[str, Gram] = field(default_factory=dict, init=False)
    apart: dict[str, str] = field(default_factory=dict, init=False)
    batches: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.subject.limit is not None:
            self.subject.limit.store.allow(0)
        self._leaders = {name: one.leader for one in self.inputs for name in one.names}
        self._read: dict[str, Any] = {}
        for one in self.inputs:
            size, device = (one.in_features, one.in_features), self.subject.device_of(one.leader)
            self.grams[one.leader] = Gram(torch.zeros(size, dtype=gram_dtype(device), device=device))

    def add(self, batch: Batch) -> None:
        """Run the 16-bit model on `batch` and add what the linears read."""
        forward = self.forward(batch, self.batches)
        # Each set of matrices is a kind of work of its own: what it leaves to weights differs.
        with self.subject.running(self.kind, batch.elements):
            _run(self.subject, batch, forward)
        self.batches += 1

    def add_all(self, batches: Iterable[Batch], done: Callable[[], None] = lambda: None) -> None:
        """Add each of `batches`; `done` is called after each."""
        for batch in batches:
            self.add(batch)
            done()

    @property
    def kind(self) -> str:
        """Of the work, see `MemoryLimit.running`."""
        return f"gram {self.inputs[0].leader if self.inputs else 'of nothing'}"

    def forward(self, batch: Batch, number: int, tiles: Tensor | None = None) -> LayerForward:
        """What linears compute while they read `batch`, which is batch `number`: it adds what they read.

        tiles: see `tiles_that_count`, where the batch has no inputs any more.
        """
        tiles = tiles_that_count(batch) if batch.inputs else tiles

        def forward(name: str, product: Product, x: Tensor) -> Tensor:
            """What layer `name` puts out for `x` in 16-bit; the first to read `x` adds it to its matrix."""
            leader = self._leaders.get(name)
            if leader == name:
                layer, tokens = self.subject.layers[name], x.numel() // x.shape[-1]
                weights = None if self.weights is None else self.weights(name, number)
                if weights is not None and len(weights) != tokens:
                    self.apart |= {n: UNLIKE for n, of in self._leaders.items() if of == name}
                else:
                    mask = counted_tokens(layer, tokens, batch, tiles)
                    self.grams[name].add(x, mask, weights, batch.weight)
                self._read[name] = ref(x)
            elif leader is not None:
                read = self._read.get(leader)
                if read is None or read() is not x:
                    self.apart[name] = APART
            return times(product, x, self.subject.dequantized.own(name).to(x.dtype))

        return forward


def counted_tokens(layer: Linear, tokens: int, batch: Batch, tiles: Tensor | None) -> Tensor | None:
    """(tokens,) on the CPU, False for what pads texts or images in what `layer` reads; None where all count.

    tokens: rows of that input, of the whole batch. tiles: see `tiles_that_count`.
    """
    kinds = None if tokens % batch.size else batch.kinds_of(tokens // batch.size, layer.reads)
    if layer.reads == "text" or kinds is not None:
        return None if kinds is None or bool((kinds != PAD).all()) else (kinds != PAD).reshape(-1)
    if tiles is None or layer.tower == "vision" or tokens % len(tiles):
        return None
    return tiles.repeat_interleave(tokens // len(tiles))


def tiles_that_count(batch: Batch) -> Tensor | None:
    """(tiles of all images,) on the CPU, False for those that no text token attends to; None where all count.

    Known where the model takes a mask of whole tiles (Mllama's `cross_attention_mask`). What the projector
    and the keys and values of cross-attention read of other tiles reaches nothing, so it does not count.
    Within the vision tower all counts, since Mllama masks padding there from other padding only: the tokens
    of an image attend to it. Padding of models that mask single pixels or patches is not told apart.
    """
    mask = batch.inputs.get("cross_attention_mask")
    if mask is None or mask.dim() != 4:  # (samples, text tokens, images, tiles)
        return None
    tiles = mask.bool().any(dim=1).reshape(-1).cpu()
    return None if bool(tiles.all()) else tiles


def _run(subject: Subject, batch: Batch, forward: LayerForward) -> None:
    # Not in inference mode: there tensors have no version, which tells a tensor changed in place.
    with torch.no_grad(), replaced_forwards(subject.modules, forward):
        run_model(subject.model, batch)


def passes(inputs: Sequence[SharedInput], limit_bytes: int, device: torch.device) -> list[list[SharedInput]]:
    """`inputs` cut into runs whose Gram matrices fit `limit_bytes` together; never less than one."""
    parts: list[list[SharedInput]] = []
    room = 0
    for one in inputs:
        size = gram_bytes(one.in_features, device)
        if not parts or size > room:
            parts.append([])
            room = limit_bytes
        parts[-1].append(one)
        room -= size
    return parts


def gathered(
    subject: Subject,
    inputs: Sequence[SharedInput],
    batches: Iterable[Batch],
    done: Callable[[], None] = lambda: None,
    weights: Weights | None = None,
) -> Gathering:
    """The Gram matrices of `inputs` over all `batches`; `done` is called after each. weights: of tokens."""
    gathering = Gathering(subject, inputs, weights)
    gathering.add_all(batches, done)
    return gathering
