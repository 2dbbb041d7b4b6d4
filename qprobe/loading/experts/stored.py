"""Fused weights of experts where they lie in a checkpoint: whole, or in pieces, as one tensor per expert.

transformers puts the pieces together when it loads a checkpoint. It is asked which tensors belong to which
weight, and its own conversion then runs on those of one weight alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from qprobe.errors import ModelError


@dataclass(frozen=True, eq=False)
class StoredExperts:
    """One fused weight in the files of `model`.

    name: of its parameter. tensors: its pieces, as the files call them, in the order in which they are put
    together.
    """

    model: Any
    name: str
    tensors: tuple[str, ...]
    conversion: Any  # transformers.core_model_loading.WeightTransform
    patterns: tuple[str, ...]  # of the conversion, that each of the tensors met

    def read(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """The weight as the loaded model holds it; tensor: reads the one of a name.

        Raises ModelError if the pieces do not make a weight of the model's shape.
        """
        conversion = deepcopy(self.conversion)
        for name, pattern in zip(self.tensors, self.patterns, strict=True):
            conversion.add_tensor(self.name, name, pattern, partial(tensor, name))
        found = conversion.convert(self.name, model=self.model, config=self.model.config)[self.name]
        weight = found[0] if isinstance(found, list) else found
        wanted = tuple(self.model.get_parameter(self.name).shape)
        if tuple(weight.shape) != wanted:
            raise ModelError(
                f"{self.name} has the shape {list(weight.shape)} in the files ({self.tensors[0]}), and the "
                f"model needs {list(wanted)}. Copy the checkpoint again."
            )
        return weight


def stored_experts(model: Any, names: Iterable[str], tensors: Iterable[str]) -> dict[str, StoredExperts]:
    """Those of the fused weights `names` that the files hold, by name.

    model: on the meta device. tensors: names of all that the files hold.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    wanted, prefix, state = frozenset(names), model.base_model_prefix, model.state_dict()
    if not wanted:
        return {}
    conversions = get_model_conversion_mapping(model)
    renamings = [x for x in conversions if isinstance(x, WeightRenaming)]
    converters = [x for x in conversions if isinstance(x, WeightConverter)]
    by_pattern = {pattern: x for x in converters for pattern in x.source_patterns}
    pieces: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        if target in wanted:
            pieces.setdefault(target, []).append((key, pattern))
    found = {}
    for name, parts in pieces.items():
        keys, patterns = zip(*parts, strict=True)
        if patterns[0] is None:
            conversion, patterns = WeightRenaming(keys[0], name), keys
        else:
            conversion = by_pattern[patterns[0]]
        found[name] = StoredExperts(model, name, keys, conversion, patterns)
    return found
