"""Arithmetic of bf16 by way of float32, nine times as fast on processors that emulate bf16.

Results are rounded to bf16 as before, and differ from the processor's own in the last bit at most, since that
adds up in float32 as well. For tests that run larger models than `tests.tiny`, and compare nothing with a
process that has not done the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPERATIONS = ((torch.nn.functional, "linear"), (torch.nn.functional, "conv2d"), (torch, "matmul"))


def by_float32(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`operation`, with tensors in bf16 on a CPU taken as float32 and its result rounded to bf16."""

    @functools.wraps(operation)
    def computed(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return operation(x, *rest, **named)
        wide = [y.float() if isinstance(y, Tensor) else y for y in rest]
        more = {key: y.float() if isinstance(y, Tensor) else y for key, y in named.items()}
        return operation(x.float(), *wide, **more).to(x.dtype)

    return computed


def compute_bf16_by_float32(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Replaces torch's operations for good, or as long as `replace` (monkeypatch.setattr) says."""
    for place, name in OPERATIONS:
        replace(place, name, by_float32(getattr(place, name)))
