"""Adapters that hold a correction beside what they learn.

The first rows of lora_A and columns of lora_B are those of a fresh adapter, which are trained; the others
hold the correction of the 4-bit weight, and stay. So training begins at a better model, and is otherwise that
of an adapter that begins at zero. Where the correction itself was trained, adapters ended worse than from
zero: a step of Adam moves every number by about the learning rate, and hence a product of large factors
farther (reports/starts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def adapters_of(tuned: Any) -> Mapping[str, Any]:
    """By module name of the base, the layers with a LoRA adapter."""
    base = tuned.get_base_model()
    return {name: x for name, x in base.named_modules() if hasattr(x, "lora_A")}


def hold(tuned: Any, rows: slice) -> list[Any]:
    """Handles, each with `remove()`, of what keeps `rows` of every adapter of `tuned` from being trained.

    tuned: a peft model. rows: of lora_A, and the columns of lora_B. Their gradients are 0 from now on, so
    that no optimizer moves them that works number by number (SGD, AdamW), whichever trainer has it; weight
    decay would, and what mixes rows (Muon). Read again from a file, all of the adapter is trained.
    """
    found = []
    for layer in adapters_of(tuned).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found.append(a.register_hook(lambda gradient: _without(gradient, (rows,))))
        found.append(b.register_hook(lambda gradient: _without(gradient, (slice(None), rows))))
    return found


def learned_numbers(tuned: Any, rank: int) -> int:
    """How many numbers of the adapters of `tuned` are trained: all but what is held behind `rank`."""
    layers = adapters_of(tuned).values()
    pairs = ((x.lora_A["default"].weight, x.lora_B["default"].weight) for x in layers)
    return sum(a[:rank].numel() + b[:, :rank].numel() for a, b in pairs)


@contextmanager
def held(tuned: Any, rows: slice) -> Iterator[None]:
    """While open, `rows` of every adapter of `tuned` are not trained."""
    handles = hold(tuned, rows)
    try:
        yield
    finally:
        for one in handles:
            one.remove()


def _without(gradient: Tensor, place: tuple[slice, ...]) -> Tensor:
    kept = gradient.clone()
    kept[place] = 0
    return kept
