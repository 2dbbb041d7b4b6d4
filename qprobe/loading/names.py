"""Module names of the running transformers <-> names in the checkpoint files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def checkpoint_names(model: nn.Module, layers: tuple[str, ...]) -> dict[str, str]:
    """For each linear (module name): its name in the files that the model came from or would be saved to.

    transformers renames old checkpoints on loading and undoes it on saving; we ask it to undo the
    names of one weight at a time. A layer whose weight is split or merged in the files keeps its module name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found = {}
    with _conversions_at_hand(model) as are_there:
        if not are_there:
            return {layer: layer for layer in layers}
        for layer in layers:
            weight = torch.empty((2, 2), device="meta")
            try:
                reverted = list(revert_weight_conversion(model, {f"{layer}.weight": weight}))  # type: ignore[arg-type]
            except Exception:  # a converter that needs real data or its sibling weights
                reverted = []
            single = reverted[0] if len(reverted) == 1 else ""
            found[layer] = single.removesuffix(".weight") if single.endswith(".weight") else layer
    return found


@contextmanager
def _conversions_at_hand(model: Any) -> Iterator[bool]:
    """Lends `model` its conversions, as loading does; False if there are none.

    Of a model without them transformers 5.17 to 5.23 searches all modules again for each name: 15 s for a
    model of 90 billion parameters. What it would find is what stands here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if getattr(model, "_weight_conversions", None) is not None:
        yield True
        return
    every = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [x for x in every if not isinstance(x, PrefixChange)]
    try:
        yield len(model._weight_conversions) > 0
    finally:
        del model._weight_conversions
