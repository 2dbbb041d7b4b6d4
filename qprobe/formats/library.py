"""bitsandbytes, imported without torch's compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch


def import_bitsandbytes() -> None:
    """Import bitsandbytes, unless that was done; whoever needs it first should do it by this.

    bitsandbytes 0.50 hands four functions to torch.compile while it is imported: 8-bit matrices, and
    optimizers without kernels of their own. torch then imports its whole compiler, more than a second of
    processor time, for functions that nothing here calls. Can go once bitsandbytes compiles what is called.
    """
    if "bitsandbytes" not in sys.modules:
        with compiling_late():
            import bitsandbytes  # noqa: F401


@contextmanager
def compiling_late() -> Iterator[None]:
    """What is handed to torch.compile meanwhile is compiled when it is first called."""
    compile_now = torch.compile
    torch.compile = partial(_late, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _late(compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any) -> Any:
    if function is None:  # torch.compile as a decorator with options
        return partial(_late, compile_now, **options)
    compiled = cache(lambda: compile_now(function, **options))

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call
