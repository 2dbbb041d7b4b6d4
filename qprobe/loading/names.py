"""Module names of the running transformers <-> names in the checkpoint files."""

from __future__ import annotations

import torch
from torch import nn


def checkpoint_names(model: nn.Module, layers: tuple[str, ...]) -> dict[str, str]:
    """For each linear (module name): its name in the files that the model came from or would be saved to.

    transformers renames old checkpoints on loading and undoes it on saving; we ask it to undo the
    names of one weight at a time. A layer whose weight is split or merged in the files keeps its module name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found = {}
    for layer in layers:
        weight = torch.empty((2, 2), device="meta")
        try:
            reverted = list(revert_weight_conversion(model, {f"{layer}.weight": weight}))  # type: ignore[arg-type]
        except Exception:  # a converter that needs real data or its sibling weights
            reverted = []
        single = reverted[0] if len(reverted) == 1 else ""
        found[layer] = single.removesuffix(".weight") if single.endswith(".weight") else layer
    return found
