"""What every measurement of one model shares: the model, its linears, and their 4-bit forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from qprobe.formats.protocol import Format, format_from
from qprobe.inputs.batch import Batch
from qprobe.inputs.decoder import Layout, layout_of
from qprobe.inputs.halving import Halving
from qprobe.inputs.processed import ROOM_BYTES as INPUTS_BYTES
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.experts.weights import Layer
from qprobe.loading.inventory import measured_layers
from qprobe.loading.mapped import Mapped
from qprobe.loading.reference import Reference
from qprobe.measure.attribution import Path, path_dtype
from qprobe.measure.dequantized import DequantizedWeights
from qprobe.measure.digests import weights_digest
from qprobe.measure.experts.routing import Product, times
from qprobe.measure.hooks import ROOM_BYTES, repeated_blocks, replaced_forwards
from qprobe.measure.kl import Readout, readout_of
from qprobe.measure.memory import MemoryLimit, held_bytes
from qprobe.measure.weight_store import Files, PinnedMemory, WeightStore
from qprobe.records import FormatSpec, Inventory, Linear, Sample

ROOM_SHARE = 10  # of a memory limit, one part may be what blocks keep so as not to run again

INPUTS_SHARE = 50  # and one of these, what the processor made of samples


@dataclass
class SharedRows:
    """Which layers read rows that belong to no sample, as DeBERTa's read one table of positions for all.

    Their number may well divide by that of the samples. What tells them is that a batch twice as large has
    no more of them. names: by the names of a batch's inputs, since a batch of texts runs no vision tower.
    """

    names: dict[frozenset[str], frozenset[str]] = field(default_factory=dict)

    def of(self, batch: Batch) -> frozenset[str] | None:
        """Their names; None until a batch of such inputs was noted."""
        return self.names.get(frozenset(batch.inputs))

    def note(self, batch: Batch, once: Counter[str], twice: Counter[str]) -> frozenset[str]:
        """The names, from how many rows each layer reads of `batch` and of the same batch doubled."""
        found = frozenset(name for name, rows in once.items() if twice[name] != 2 * rows)
        return self.names.setdefault(frozenset(batch.inputs), found)


@dataclass(frozen=True)
class Subject:
    """One loaded reference under measurement.

    modules: every layer by name, in module order. dequantized: their 4-bit forms, on the model's device.
    dtype: of the model as it was loaded, in which its inputs are also where the path is walked in another.
    processed: what the processor makes of samples, each held while there is room.
    limit: of the memory it may take; None where all of it is on the device.
    release: called with a parameter that was read from the host, and is not needed soon.
    halving: of batches that memory does not suffice for. shared: which layers read rows of no sample.
    """

    reference: Reference
    inventory: Inventory
    modules: dict[str, Layer]
    dequantized: DequantizedWeights
    dtype: torch.dtype
    processed: ProcessedSamples
    limit: MemoryLimit | None = None
    release: Callable[[Tensor], None] = lambda _: None
    halving: Halving = field(default_factory=Halving)
    shared: SharedRows = field(default_factory=SharedRows)

    @property
    def model(self) -> Any:
        return self.reference.model

    @cached_property
    def weights_digest(self) -> str:
        """Of the 16-bit model, see `qprobe.measure.digests.weights_digest`."""
        return weights_digest(self.model, self.reference.device, self.release)

    @cached_property
    def layers(self) -> dict[str, Linear]:
        return {x.name: x for x in self.inventory.layers}

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Names of the linears that standard 4-bit quantizes: all but the fixed ones."""
        return frozenset(x.name for x in self.inventory.layers if not x.fixed)

    @cached_property
    def quantized_modules(self) -> dict[str, Layer]:
        return {name: module for name, module in self.modules.items() if name in self.quantized}

    @cached_property
    def path(self) -> Path:
        """The path from this model to its all-4-bit form."""
        room = ROOM_BYTES if self.limit is None else min(ROOM_BYTES, self.limit.limit_bytes // ROOM_SHARE)
        texts = frozenset(x.name for x in self.inventory.layers if x.reads == "text")
        return Path(self.model, self.quantized_modules, self.dequantized, path_dtype(self.model), room, texts)

    def device_of(self, name: str) -> torch.device:
        """Where the linear `name` runs: a model may be spread over several devices."""
        return self.reference.target or self.modules[name].weight.device

    @property
    def streamed_bytes(self) -> int | None:
        """Bytes of weights copied to the device so far; None where all of them are there."""
        return None if self.dequantized.store is None else self.dequantized.store.fetched_bytes

    @cached_property
    def readout(self) -> Readout | None:
        """What damage is measured on, see `readout_of`."""
        return readout_of(self.model)

    @property
    def answers(self) -> bool:
        """True if the model answers in tokens, so that samples need an answer."""
        return self.readout is not None and self.readout.is_answer

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Open around all that runs the model: its streamed linears fetch their weights.

        The modules are as before afterwards, also when the body raises.
        """
        trips = self.dequantized

        def forward(name: str, product: Product, x: Tensor) -> Tensor:
            return times(product, x, trips.own(name).to(x.dtype))

        with replaced_forwards({name: self.modules[name] for name in sorted(trips.streamed)}, forward):
            yield

    def running(self, kind: str, size: int = 1, like: str = "") -> AbstractContextManager[None]:
        """Open around one batch of a kind of work, see `MemoryLimit.running`."""
        return nullcontext() if self.limit is None else self.limit.running(kind, size, like)

    def measured(
        self,
        kind: str,
        group: Sequence[Sample],
        observe: Callable[[Batch], Mapping[str, pd.DataFrame]],
        like: str = "",
    ) -> dict[str, pd.DataFrame]:
        """The frames that `observe` gives of the batch `group`, or of its halves where memory is short.

        kind, like: of work, see `running`.
        """

        def work(part: Sequence[Sample]) -> Mapping[str, pd.DataFrame]:
            batch = self.encode(tuple(part))
            with self.running(kind, batch.elements, like):
                return observe(batch)

        parts = [found for _, found in self.halving.run(kind, group, work)]
        if len(parts) == 1:
            return dict(parts[0])
        return {stage: pd.concat([part[stage] for part in parts]) for stage in parts[0]}

    def groups(self, samples: tuple[Sample, ...], size: int) -> list[tuple[Sample, ...]]:
        """`samples` in batches of one processed image shape, see `ProcessedSamples.batches`."""
        return self.processed.batches(samples, size)

    def one_shape_groups(self, samples: tuple[Sample, ...]) -> list[tuple[Sample, ...]]:
        """`samples` in groups of one processed image shape, see `ProcessedSamples`."""
        return self.processed.one_shape_groups(samples)

    def encode(self, samples: tuple[Sample, ...]) -> Batch:
        """The batch of `samples` on the model's device."""
        return self.processed.batch(samples).to(self.reference.device)


def processed_samples(
    processor: Any, layout: Layout, dtype: torch.dtype, limit_bytes: int | None = None
) -> ProcessedSamples:
    """What `processor` makes of samples for a model of this `layout` in `dtype`; limit_bytes: of a scan."""
    room = INPUTS_BYTES if limit_bytes is None else min(INPUTS_BYTES, limit_bytes // INPUTS_SHARE)
    return ProcessedSamples(processor, dtype, layout, room)


def limited_subject(
    reference: Reference,
    spec: FormatSpec,
    limit_bytes: int,
    folder: FilePath,
    processed: ProcessedSamples | None = None,
    is_found: bool = False,
) -> Subject:
    """`subject_of` within `limit_bytes` of the device: weights of repeated blocks wait on the host.

    reference: loaded `on_host`; the rest of it is moved to the device. folder: where files may be made while
    it lives, see `Mapped`. is_found: see `MemoryLimit`. Open `Subject.streaming` around all that runs the
    model.
    Raises MachineError if the limit is too small, with the least that would do.
    """
    modules, inventory = measured_layers(reference.model), reference.inventory(spec)
    device, fmt = reference.device, format_from(spec)
    streamed = streamed_names(reference.model, modules, inventory)
    move_rest(reference.model, {id(modules[name].weight) for name in streamed}, device)
    mapped = Mapped(folder)
    if device.type == "cpu":  # those that loading converted lie in no file yet
        for name in sorted(streamed):
            modules[name].weight.data = mapped.keep(modules[name].weight.data)
    host = Files(mapped) if device.type == "cpu" else PinnedMemory(device, mapped)
    store = WeightStore(host, window_bytes(reference.model, modules, streamed, fmt))
    limit = MemoryLimit(limit_bytes, device, store, base_bytes=held_bytes(device), is_found=is_found)
    largest = max((fmt.packing_bytes(shape_of(m), device) for m in modules.values()), default=0)
    work = store.window_bytes + largest
    limit.check(
        work, "what is never streamed, with one block of the model and one weight in work but no batch yet,"
    )
    with limit.running("pack", 1), torch.inference_mode():
        dequantized = DequantizedWeights(modules, fmt, store, streamed)
    dtype = reference.model.dtype
    if processed is None:
        processed = processed_samples(reference.processor, layout_of(reference.model), dtype, limit_bytes)
    return Subject(reference, inventory, modules, dequantized, dtype, processed, limit, mapped.forget)


def streamed_names(model: nn.Module, modules: Mapping[str, Layer], inventory: Inventory) -> frozenset[str]:
    """The linears of repeated blocks that are quantized: nearly all bytes of a large model."""
    inside = {id(m) for block in repeated_blocks(model) for m in block.modules()}
    fixed = {x.name for x in inventory.layers if x.fixed}
    return frozenset(name for name, m in modules.items() if id(owner_of(m)) in inside and name not in fixed)


def move_rest(model: nn.Module, streamed: set[int], device: torch.device) -> None:
    """Move to `device` every parameter whose id is not in `streamed`, and every buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in streamed:
            tensor.data = tensor.data.to(device)


def window_bytes(
    model: nn.Module, modules: Mapping[str, Layer], streamed: frozenset[str], fmt: Format
) -> int:
    """Bytes of both forms of the streamed weights of the largest block."""
    both: dict[int, int] = {}
    for layer in (modules[x] for x in streamed):
        owner = id(owner_of(layer))
        both[owner] = both.get(owner, 0) + layer.weight.nbytes + fmt.held_bytes(shape_of(layer))
    return max(
        (sum(both.get(id(m), 0) for m in block.modules()) for block in repeated_blocks(model)), default=0
    )


def shape_of(layer: Layer) -> tuple[int, ...]:
    """Of its weight as it is stored."""
    return tuple(layer.weight.shape)


def owner_of(layer: Layer) -> nn.Module:
    """The module that holds the weight."""
    return layer if isinstance(layer, nn.Linear) else layer.module


def subject_of(reference: Reference, spec: FormatSpec, processed: ProcessedSamples | None = None) -> Subject:
    """The subject of `reference` under the 4-bit format `spec`; every weight is packed once, here.

    processed: of samples that were processed before the model was loaded; None for none of them.
    """
    modules = measured_layers(reference.model)
    with torch.inference_mode():
        dequantized = DequantizedWeights(modules, format_from(spec))
    inventory, dtype = reference.inventory(spec), reference.model.dtype
    if processed is None:
        processed = processed_samples(reference.processor, layout_of(reference.model), dtype)
    return Subject(reference, inventory, modules, dequantized, dtype, processed)
