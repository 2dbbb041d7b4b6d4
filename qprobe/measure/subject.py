"""What every measurement of one model shares: the model, its linears, and their 4-bit round trips."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from qprobe.formats.nf4 import format_from
from qprobe.measure.attribution import Path, path_dtype
from qprobe.measure.roundtrips import RoundTrips
from qprobe.models.inventory import has_language_head, linear_modules, list_layers
from qprobe.models.reference import Reference
from qprobe.records import FormatSpec, Inventory, Linear, Sample
from qprobe.samples.inputs import Batch, batches, encode, image_token_id


@dataclass(frozen=True)
class Subject:
    """One loaded reference under measurement.

    modules: every linear by name, in module order. round_trips: their 4-bit forms, on the model's device.
    """

    reference: Reference
    inventory: Inventory
    modules: dict[str, nn.Linear]
    round_trips: RoundTrips

    @property
    def model(self) -> Any:
        return self.reference.model

    @cached_property
    def layers(self) -> dict[str, Linear]:
        return {x.name: x for x in self.inventory.layers}

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Names of the linears that standard 4-bit quantizes: all but the fixed ones."""
        return frozenset(x.name for x in self.inventory.layers if not x.fixed)

    @cached_property
    def quantized_modules(self) -> dict[str, nn.Linear]:
        return {name: module for name, module in self.modules.items() if name in self.quantized}

    @cached_property
    def path(self) -> Path:
        """The path from this model to its all-4-bit form."""
        return Path(self.model, self.quantized_modules, self.round_trips, path_dtype(self.model))

    @cached_property
    def has_head(self) -> bool:
        """True if the model gives token logits, so that KL and sensitivity apply."""
        return has_language_head(self.model)

    def groups(self, samples: tuple[Sample, ...], size: int) -> list[tuple[Sample, ...]]:
        """`samples` in batches of one processed image shape, see `qprobe.samples.inputs.batches`."""
        return batches(self.reference.processor, samples, size)

    def encode(self, samples: tuple[Sample, ...]) -> Batch:
        """The batch of `samples` on the model's device."""
        token = image_token_id(self.model.config)
        batch = encode(self.reference.processor, samples, self.model.dtype, token)
        return batch.to(self.reference.device)


def subject_of(reference: Reference, spec: FormatSpec) -> Subject:
    """The subject of `reference` under the 4-bit format `spec`; every weight is packed once, here."""
    modules = linear_modules(reference.model)
    with torch.inference_mode():
        round_trips = RoundTrips(modules, format_from(spec))
    return Subject(reference, list_layers(reference.model, spec), modules, round_trips)
