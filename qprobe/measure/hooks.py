"""Replacing what linears and blocks compute for a while, and putting everything back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LinearForward = Callable[[str, nn.Linear, Tensor], Tensor]


@contextmanager
def replaced_forwards(modules: Mapping[str, nn.Linear], forward: LinearForward) -> Iterator[None]:
    """While open, each linear computes `forward(name, module, x)` instead of x W^T + b.

    The modules are as before afterwards, also when the body raises.
    """
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.__dict__["forward"] = _bound(forward, name, module)
        yield
    finally:
        for name, module in modules.items():
            _restore(module, before[name])


def _bound(forward: LinearForward, name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda input: forward(name, module, input)  # "input" is nn.Linear's own argument name


def _restore(module: nn.Module, before: Any) -> None:
    if before is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = before


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """While open, each repeated block keeps only its inputs for the backward pass and runs again there.

    transformers' own gradient checkpointing acts in training mode only, which would switch dropout on.
    """
    blocks = repeated_blocks(model)
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = _checkpointed(block.forward)
        yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            _restore(block, old)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost members of module lists that hold linears: the layers of each tower."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            is_block = isinstance(module, nn.ModuleList) and any(
                type(m) is nn.Linear for m in child.modules()
            )
            if is_block:
                blocks.append(child)
            else:
                visit(child)

    visit(model)
    return blocks


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
