"""Weights that wait on the host, in memory or in files, until a layer asks for them.

The device holds a set of chosen weights for as long as `allow` lets it, and a window of those asked for last:
one block of the model, so that a block that runs again for its backward pass finds them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from qprobe.loading.mapped import Mapped

Tensors = tuple[Tensor, ...]
_GOLDEN = 0.6180339887498949


class Key(NamedTuple):
    """Which weight: of the linear `name` the 16-bit ("own") or the 4-bit ("packed") form."""

    form: Literal["own", "packed"]
    name: str


class Host(Protocol):
    """Where weights wait."""

    def keep(self, key: Key, tensors: Tensors) -> None:
        """Take `tensors`, of any device, under `key`, in place of what was there."""
        ...

    def load(self, key: Key) -> Tensors:
        """Fresh copies on the device of what is kept under `key`."""
        ...


class PinnedMemory:
    """The host's memory, page-locked where a copy to a CUDA device is to be fast.

    A weight is page-locked when it is first asked for. The pages of a file that it was mapped from are let
    go then, so that it is not held twice. Where the system locks no more, the rest is copied from memory as
    it is, several times as slow.
    """

    def __init__(self, device: torch.device, mapped: Mapped) -> None:
        self._device = device
        self._mapped = mapped
        self._kept: dict[Key, Tensors] = {}
        self._locked: set[Key] = set()
        self._locks = True

    def keep(self, key: Key, tensors: Tensors) -> None:
        self._kept[key] = tuple(t.detach().cpu() for t in tensors)
        self._locked.discard(key)

    def load(self, key: Key) -> Tensors:
        if self._device.type == "cuda" and self._locks and key not in self._locked:
            self._lock(key)
        held = self._kept[key]
        if self._device.type == "cpu":
            return tuple(t.clone() for t in held)
        return tuple(t.to(self._device, non_blocking=True) for t in held)

    def _lock(self, key: Key) -> None:
        read = self._kept[key]
        try:
            self._kept[key] = tuple(t.pin_memory() for t in read)
        except RuntimeError:  # what torch raises where the system refuses
            self._locks = False
            return
        self._locked.add(key)
        for tensor in read:
            self._mapped.forget(tensor)


class Files:
    """Files mapped into memory, for models that run on the CPU: what is not in use takes no memory."""

    def __init__(self, mapped: Mapped) -> None:
        self._mapped = mapped
        self._kept: dict[Key, Tensors] = {}

    def keep(self, key: Key, tensors: Tensors) -> None:
        self._kept[key] = tuple(self._mapped.keep(t.detach()) for t in tensors)

    def load(self, key: Key) -> Tensors:
        held = self._kept[key]
        copies = tuple(t.clone() for t in held)
        for tensor in held:
            self._mapped.forget(tensor)
        return copies


@dataclass
class WeightStore:
    """The weights on a host, and those of them that are on the device.

    window_bytes: of weights that are kept after use. fetched_bytes: copied to the device so far.
    """

    host: Host
    window_bytes: int
    fetched_bytes: int = 0
    _sizes: dict[Key, int] = field(default_factory=dict)
    _chosen: frozenset[Key] = frozenset()
    _resident: dict[Key, Tensors] = field(default_factory=dict)
    _window: OrderedDict[Key, Tensors] = field(default_factory=OrderedDict)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the chosen weights that are on the device now."""
        return sum(self._sizes[key] for key in self._resident)

    @property
    def kept_bytes(self) -> int:
        """Bytes of all weights of the store."""
        return sum(self._sizes.values())

    def keep(self, key: Key, tensors: Tensors) -> None:
        """Let the host keep `tensors` under `key`, in place of what was there."""
        self._resident.pop(key, None)
        self._window.pop(key, None)
        self.host.keep(key, tensors)
        self._sizes[key] = sum(t.nbytes for t in tensors)

    def get(self, key: Key) -> Tensors:
        """The tensors of `key` on the device; copied there if they are not there yet. Not to be changed."""
        if key in self._resident:
            return self._resident[key]
        if key in self._window:
            self._window.move_to_end(key)
            return self._window[key]
        # What an inference mode around it makes could not be saved for a backward pass later on.
        with torch.inference_mode(False), torch.no_grad():
            found = self.host.load(key)
        self.fetched_bytes += self._sizes[key]
        if key in self._chosen:
            self._resident[key] = found
        else:
            self._window[key] = found
            self._shrink_window()
        return found

    def allow(self, allowed_bytes: int) -> None:
        """Let weights of so many bytes stay on the device; what stays no longer is dropped at once.

        Those allowed are copied when they are next asked for.
        """
        self._chosen = chosen_keys(self._sizes, allowed_bytes)
        for key in [key for key in self._resident if key not in self._chosen]:
            del self._resident[key]
        self._shrink_window()

    def _shrink_window(self) -> None:
        held = sum(self._sizes[key] for key in self._window)
        while held > self.window_bytes and len(self._window) > 1:
            key, _ = self._window.popitem(last=False)
            held -= self._sizes[key]


def chosen_keys(sizes: Mapping[Key, int], allowed_bytes: int) -> frozenset[Key]:
    """The weights that are worth most on the device, of `allowed_bytes` together at most.

    4-bit forms come first: every candidate reads them, the 16-bit ones are read once per batch. Of the
    16-bit ones those that have to be copied lie evenly among those that stay (by the golden ratio), so that
    copies and products alternate.
    """
    own = [key for key in sizes if key.form == "own"]
    spread = {key: (i * _GOLDEN) % 1 for i, key in enumerate(own)}
    found, left = set(), allowed_bytes
    for key in [k for k in sizes if k.form == "packed"] + sorted(own, key=lambda k: spread[k]):
        if sizes[key] <= left:
            found.add(key)
            left -= sizes[key]
    return frozenset(found)
