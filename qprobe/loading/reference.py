"""The 16-bit reference model, loaded with its processor and its identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from qprobe.loading.device import DTYPES, pick_device
from qprobe.loading.inventory import fingerprint, list_layers
from qprobe.loading.mapped import return_freed_memory
from qprobe.loading.pretrained import load_pretrained
from qprobe.loading.processor import load_processor, name_padding
from qprobe.loading.skeleton import Skeleton, skeleton_of
from qprobe.loading.source import Source, at_revision, resolve
from qprobe.loading.spread import (
    check_layout,
    devices_of,
    free_bytes,
    is_too_large,
    needed_bytes,
    room_for_weights,
)
from qprobe.records import FormatSpec, Inventory, ModelIdentity
from qprobe.system.devices import BEST, AskedDevice, parse_device


@dataclass(frozen=True)
class Reference:
    """A loaded 16-bit model in eval mode with frozen parameters, and what belongs to it.

    processor: a processor for image + text models, a tokenizer for text models, None where neither exists.
    target: the device that it runs on, where its weights do not all lie there; None where they do.
    """

    model: Any  # transformers.PreTrainedModel
    processor: Any
    identity: ModelIdentity
    skeleton: Skeleton
    target: torch.device | None = None

    @property
    def source(self) -> Source:
        """Where it was loaded from."""
        return self.skeleton.source

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.target or next(self.model.parameters()).device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that it runs on: several where it is spread over GPUs."""
        return (self.target,) if self.target else devices_of(self.model)

    def inventory(self, spec: FormatSpec) -> Inventory:
        """The skeleton's inventory under `spec`, or that of the loaded model where there is no skeleton."""
        skeleton = self.skeleton
        return skeleton.inventory(spec) if skeleton.is_buildable else list_layers(self.model, spec)


def load_reference(
    model: str,
    device: str | None = None,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    revision: str | None = None,
    on_host: bool = False,
) -> Reference:
    """The 16-bit model, processor and identity behind `model` (alias, folder or hub id).

    revision: commit, tag or branch on the hub; None for the newest; of no meaning for a folder.
    Other arguments and errors as of `reference_of`.
    """
    asked = parse_device(device)
    return reference_of(skeleton_of(at_revision(resolve(model), revision), dtype), asked, on_host)


def reference_of(
    skeleton: Skeleton, device: AskedDevice = BEST, on_host: bool = False, processor: Any = None
) -> Reference:
    """The 16-bit model of `skeleton` with its weights, in the skeleton's dtype.

    device: all GPUs spreads it over them, as the best there is does where the first one is too small.
    on_host: leave the weights on the CPU, in the files that are mapped there; else they go straight to the
    device. processor: the model's, if it is loaded already.
    Only safetensors are read, no pickle and no remote code.
    Raises ModelError if it cannot be had or its files lack a tensor, MachineError for a device that is not
    here and for too few GPUs.
    """
    source = skeleton.source
    place = pick_device(device.one)
    if on_host and place.type == "cpu":
        return_freed_memory()
    layout = _layout(skeleton, device, torch.device("cpu") if on_host else place)
    loaded = load_pretrained(skeleton, dtype=DTYPES[skeleton.dtype], **layout)
    if processor is None:
        processor = load_processor(source)
    check_layout(getattr(loaded, "hf_device_map", {}) if place.type == "cuda" and not on_host else {})
    loaded.eval().requires_grad_(False)
    name_padding(loaded, processor)
    revision = source.revision or getattr(loaded.config, "_commit_hash", None)
    identity = ModelIdentity(source.id, revision, type(loaded).__name__, fingerprint(loaded))
    return Reference(loaded, processor, identity, skeleton, place if on_host else None)


def _layout(skeleton: Skeleton, asked: AskedDevice, place: torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained that say where the weights go: to `place`, or over all GPUs.

    asked: the device that the user named. Raises MachineError if all GPUs together are too few.
    """
    alone: dict[str, Any] = {"device_map": {"": place}}
    if not asked.may_be_all or place.type != "cuda":
        return alone
    cards = asked.cards or tuple(range(torch.cuda.device_count()))
    if len(cards) < 2:
        return alone
    needed, free = needed_bytes(skeleton.model), free_bytes(cards)
    if asked.kind is None and not is_too_large(needed, free, cards[0]):
        return alone
    return {"device_map": "auto", "max_memory": room_for_weights(needed, free)}
