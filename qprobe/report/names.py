"""Short names of layers, for places where a full module name does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# Components that every name of an architecture repeats and that tell no layers apart.
_SILENT = frozenset({"model", "layers", "layer", "blocks", "block", "encoder", "decoder", "transformer", "h"})
_SHORTER = {
    "vision_model": "vision",
    "vision_tower": "vision",
    "visual": "vision",
    "global_transformer": "global",
    "multi_modal_projector": "projector",
    "language_model": "text",
    "text_model": "text",
}


def short_names(names: Iterable[str]) -> dict[str, str]:
    """A short label for each of `names`; a label that two layers would share falls back to the full name.

    model.vision_model.transformer.layers.13.mlp.fc2 becomes vision.13.mlp.fc2
    """
    short = {name: _shorten(name) for name in names}
    uses = Counter(short.values())
    return {name: label if uses[label] == 1 else name for name, label in short.items()}


def _shorten(name: str) -> str:
    parts = [_SHORTER.get(part, part) for part in name.split(".") if part not in _SILENT]
    if not parts:
        return name
    label = ".".join(parts)
    return f"text.{label}" if label[0].isdigit() else label


def kind_of(name: str) -> str:
    """What a layer is within its block: the last part of its name, with those after it if they are numbers.

    model.language_model.layers.8.cross_attn.o_proj is an o_proj, visual.merger.mlp.0 an mlp.0
    """
    parts = name.split(".")
    last = next((i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()), 0)
    return ".".join(parts[last:])
