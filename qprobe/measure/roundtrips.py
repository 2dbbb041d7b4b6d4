"""Every weight of a model in its 4-bit form, kept beside the 16-bit one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qprobe.formats.protocol import Format, Packed


class RoundTrips:
    """The packed weights of some linears; W-hat and D = W-hat - W are unpacked on demand.

    Memory: the packed bytes of all weights, plus one unpacked weight while it is in use.
    """

    def __init__(self, modules: Mapping[str, nn.Linear], fmt: Format) -> None:
        self.modules = dict(modules)
        self._packed: dict[str, Packed] = {name: fmt.pack(m.weight) for name, m in self.modules.items()}

    def put(self, name: str, packed: Packed) -> None:
        """Let `packed` be the 4-bit weight of the linear `name` from now on, not what `fmt` made of it."""
        assert name in self._packed, name
        self._packed[name] = packed

    def weight(self, name: str) -> Tensor:
        """W-hat: the 4-bit weight as it is read back, (out_features, in_features), in the model's dtype."""
        return self._packed[name].unpack()

    def difference(self, name: str, dtype: torch.dtype) -> Tensor:
        """D = W-hat - W in `dtype`, rounded once (torch subtracts 16-bit numbers in float32)."""
        return self.weight(name).to(dtype) - self.modules[name].weight.detach().to(dtype)

    def between(self, name: str, alpha: float, dtype: torch.dtype) -> Tensor:
        """W + alpha D in `dtype`, rounded once: W at 0, W-hat at 1."""
        own = self.modules[name].weight.detach().to(dtype)
        return own if alpha == 0 else torch.lerp(own, self.weight(name).to(dtype), alpha)
