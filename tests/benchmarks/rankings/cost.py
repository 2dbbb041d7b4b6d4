"""What a piece of work costs, counted in passes of all samples and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Cost:
    """forwards: passes without a gradient; gradients: passes forward, forward again and backward.

    Both are counted in samples until they are divided by the number of samples.
    """

    seconds: float = 0.0
    forwards: float = 0.0
    gradients: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds, self.forwards + other.forwards, self.gradients + other.gradients
        )

    def per(self, samples: int) -> Cost:
        """The same cost with passes of all `samples` in place of passes of one."""
        return Cost(self.seconds, self.forwards / samples, self.gradients / samples)


@contextmanager
def counted(model: nn.Module) -> Iterator[Cost]:
    """The cost, in samples, of what `model` does while open; it is complete when this closes."""
    cost = Cost()

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object) -> None:
        size = kwargs["input_ids"].shape[0]
        if torch.is_grad_enabled():
            cost.gradients += size
        else:
            cost.forwards += size

    handle = model.register_forward_hook(note, with_kwargs=True)
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        handle.remove()
