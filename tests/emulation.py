"""Arithmetic of bf16 by way of float32, many times as fast on processors that emulate bf16.

Results are rounded to bf16 as before, and differ from the processor's own in the last bit at most, since that
adds up in float32 as well. `tests/conftest.py` replaces torch's operations for all tests; what compares bits
with another process either does the same there, or asks for the fixture `own_bf16`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPERATIONS = (
    *((torch.nn.functional, name) for name in ("linear", "conv2d")),
    *((torch, name) for name in ("matmul", "mm", "bmm", "addmm")),
    *((Tensor, name) for name in ("matmul", "__matmul__")),
)


def has_bf16() -> bool:
    """Whether this processor, or the library that torch hands matrices to, multiplies in bf16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def by_float32(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`operation`, with tensors in bf16 on a CPU taken as float32 and its result rounded to bf16."""

    @functools.wraps(operation)
    def computed(x: Tensor, *rest: Any, out: Tensor | None = None, **named: Any) -> Tensor:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return operation(x, *rest, **named) if out is None else operation(x, *rest, out=out, **named)
        wide = [y.float() if isinstance(y, Tensor) else y for y in rest]
        more = {key: y.float() if isinstance(y, Tensor) else y for key, y in named.items()}
        result = operation(x.float(), *wide, **more).to(x.dtype)
        return result if out is None else out.copy_(result)

    return computed


def compute_bf16_by_float32(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Replaces torch's operations for good, or as long as `replace` (monkeypatch.setattr) says.

    Nothing is replaced where the processor multiplies in bf16 itself.
    """
    if not has_bf16():
        for place, name in OPERATIONS:
            replace(place, name, by_float32(getattr(place, name)))


def compute_bf16_by_itself(replace: Callable[[Any, str, Any], None]) -> None:
    """Puts torch's own operations back, as long as `replace` says."""
    for place, name in OPERATIONS:
        replace(place, name, inspect.unwrap(getattr(place, name)))
