"""Every weight of a model in its 4-bit form, kept beside the 16-bit one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qprobe.formats.protocol import Format, Packed
from qprobe.loading.experts.weights import Layer
from qprobe.measure.weight_store import Key, WeightStore


class DequantizedWeights:
    """The packed weights of some linears; W-hat and D = W-hat - W are unpacked on demand.

    Memory: the packed bytes of all weights, plus one unpacked weight while it is in use. Of the linears in
    `streamed`, both forms wait in `store` instead, and `modules[name].weight` is not on the device.
    """

    def __init__(
        self,
        modules: Mapping[str, Layer],
        fmt: Format,
        store: WeightStore | None = None,
        streamed: frozenset[str] = frozenset(),
    ) -> None:
        self.modules = dict(modules)
        self.store = store
        self.streamed = streamed
        self._packed: dict[str, Packed] = {}
        for name, module in self.modules.items():
            if store is not None and name in streamed:
                store.keep(Key("own", name), (module.weight,))
            self._put(name, fmt.pack(self.own(name)))

    def put(self, name: str, packed: Packed) -> None:
        """Let `packed` be the 4-bit weight of the linear `name` from now on, not what `fmt` made of it."""
        assert name in self._packed, name
        self._put(name, packed)

    def _put(self, name: str, packed: Packed) -> None:
        if self.store is not None and name in self.streamed:
            self.store.keep(Key("packed", name), packed.tensors)
            self._packed[name] = packed.with_tensors(tuple(t.new_empty(0) for t in packed.tensors))
        else:
            self._packed[name] = packed

    def own(self, name: str) -> Tensor:
        """W as it is stored, (out_features, in_features) of a linear, on the device.

        In the model's dtype, or in that of the path while it is walked, where the weight is not streamed.
        """
        if self.store is None or name not in self.streamed:
            return self.modules[name].weight.detach()
        return self.store.get(Key("own", name))[0]

    def weight(self, name: str) -> Tensor:
        """W-hat: the 4-bit weight as it is read back, of the shape of `own`, in the model's dtype."""
        packed = self._packed[name]
        if self.store is not None and name in self.streamed:
            packed = packed.with_tensors(self.store.get(Key("packed", name)))
        return packed.unpack()

    def difference(self, name: str, dtype: torch.dtype) -> Tensor:
        """D = W-hat - W in `dtype`, rounded once (torch subtracts 16-bit numbers in float32)."""
        return self.weight(name).to(dtype) - self.own(name).to(dtype)

    def between(self, name: str, alpha: float, dtype: torch.dtype) -> Tensor:
        """W + alpha D in `dtype`, rounded once: W at 0, W-hat at 1."""
        own = self.own(name).to(dtype)
        return own if alpha == 0 else torch.lerp(own, self.weight(name).to(dtype), alpha)
