"""Replacing what linears and blocks compute for a while, and putting everything back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qprobe.loading.experts.weights import ExpertWeight, Layer, expert_weight, expert_weights
from qprobe.measure.experts.routing import Product, Routing, routed, run_experts, times

LayerForward = Callable[[str, Product, Tensor], Tensor]
"""(name, what multiplies, its rows) -> that layer's output."""

# What a backward pass may keep beyond the inputs of blocks: all of a small model's activations, for which
# running twice would cost most, and little beside the weights of a large one.
ROOM_BYTES = 2 * 2**30


@contextmanager
def replaced_forwards(layers: Mapping[str, Layer], forward: LayerForward) -> Iterator[None]:
    """While open, each layer computes `forward(name, product, x)` instead of x W^T + b.

    Of fused experts x holds the rows that are routed, sorted by expert. The modules are as before afterwards,
    also when the body raises.
    """
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    inside = {id(x.module): x.module for x in layers.values() if isinstance(x, ExpertWeight)}
    modules = [*linears.values(), *inside.values()]
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for name, module in linears.items():
            module.__dict__["forward"] = _bound(forward, name, module)
        for module in inside.values():
            own = {n: x for n, x in layers.items() if isinstance(x, ExpertWeight) and x.module is module}
            module.__dict__["forward"] = _ExpertsForward(module, own, forward, module.__dict__.get("forward"))
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            _restore(module, old)


class _ExpertsForward:
    """The forward of a module of experts whose products are replaced, all or some of them.

    own: the layers by name that `forward` computes. A product that it does not is left to `before`, the
    forward that was in place, or computed with the module's own weight.
    """

    def __init__(
        self, module: nn.Module, own: Mapping[str, ExpertWeight], forward: LayerForward, before: Any
    ) -> None:
        self._module = module
        self._before = before if isinstance(before, _ExpertsForward) else None
        self._own = {layer.parameter: (name, layer, forward) for name, layer in own.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        hook: Any = getattr(self._module, "_hf_hook", None)
        if hook is None:
            return run_experts(self._module, self.multiply, *args, **kwargs)
        args, kwargs = hook.pre_forward(self._module, *args, **kwargs)  # as in `_bound`
        return hook.post_forward(self._module, run_experts(self._module, self.multiply, *args, **kwargs))

    def multiply(self, parameter: str, x: Tensor, rows: Routing) -> Tensor:
        if parameter in self._own:
            name, layer, forward = self._own[parameter]
            return forward(name, routed(layer, rows), x)
        if self._before is not None:
            return self._before.multiply(parameter, x, rows)
        layer = expert_weight(self._module, parameter)
        return times(routed(layer, rows), x, layer.weight)


def _bound(forward: LayerForward, name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        return lambda input: forward(name, module, input)  # "input" is nn.Linear's own argument name

    def moved(input: Tensor) -> Tensor:
        # accelerate's hook is in the forward that is replaced: it moves inputs to where the weight lies.
        (x,), _ = hook.pre_forward(module, input)
        return hook.post_forward(module, forward(name, module, x))

    return moved


def _restore(module: nn.Module, before: Any) -> None:
    if before is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = before


@contextmanager
def checkpointed_blocks(model: nn.Module, room_bytes: int = ROOM_BYTES) -> Iterator[None]:
    """While open, repeated blocks keep only their inputs for the backward pass and run again there.

    The first blocks keep everything as long as that is expected to fit into `room_bytes`. Of the others the
    outputs of attention are kept too: they are small, and at full size attention over image tiles is more
    than half of a forward pass. transformers' own gradient checkpointing acts in training mode only, which
    would switch dropout on.
    """
    room = _Room(room_bytes)
    with wrapped_blocks(repeated_blocks(model), lambda _, block: _checkpointed(block, room)):
        yield


@contextmanager
def wrapped_blocks(
    blocks: Sequence[nn.Module], wrapped: Callable[[int, nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """While open, each of `blocks` computes the function that `wrapped` makes of its number and itself.

    The blocks are as before afterwards, also when the body raises.
    """
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for number, block in enumerate(blocks):
            block.__dict__["forward"] = wrapped(number, block)
        yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            _restore(block, old)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost members of module lists that hold linears: the layers of each tower.

    A member that is a list itself, as of Florence-2's stages, is never called; its own members are.
    """
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            is_member = isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList)
            is_block = is_member and any(type(m) is nn.Linear for m in child.modules())
            if is_block:
                blocks.append(child)
            else:
                visit(child)

    visit(model)
    return blocks


@dataclass
class _Room:
    """Bytes that blocks may still keep for the backward pass."""

    left: int

    def take(self, block: nn.Module, arguments: Iterable[Any]) -> bool:
        """True, and less room, if all that `block` keeps for the backward pass is expected to fit.

        Per row of its first input, each linear keeps its input and output, and what lies between linears is
        about as much again; the linears of the path keep two forms of their weights.
        """
        x = next(a for a in arguments if isinstance(a, Tensor) and a.dim() > 1)
        layers = [*(m for m in block.modules() if type(m) is nn.Linear), *expert_weights(block).values()]
        features = sum(m.in_features + m.out_features for m in layers)
        rows = x.numel() // x.shape[-1]
        kept = (2 * rows * features + 2 * sum(m.weight.numel() for m in layers)) * x.itemsize
        is_room = kept <= self.left
        self.left -= kept if is_room else 0
        return is_room


def _checkpointed(block: nn.Module, room: _Room) -> Callable[..., Any]:
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if room.take(block, (*args, *kwargs.values())):
            return forward(*args, **kwargs)
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_keeping_attention,
            **kwargs,
        )

    return run


# Every form of torch's scaled_dot_product_attention that is a kernel of its own; the plain one is products.
_ATTENTION = tuple(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)


def _keeping_attention() -> tuple[Any, Any]:
    """Contexts for the two runs of a checkpointed block: the second finds the attention outputs of the first.

    torch's own selective checkpointing would watch every operation of the block, at more time of the CPU than
    attention takes on a fast GPU; here it watches attention alone.
    """
    keeping, finding = create_selective_checkpoint_contexts(_policy)
    return _around_attention(keeping), _around_attention(finding)


# Backward passes run in a thread for each GPU, and what is replaced here belongs to all of them.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _around_attention(mode: Any) -> Iterator[None]:
    """While open, torch's scaled_dot_product_attention runs inside `mode`."""
    with _ONE_AT_A_TIME:
        yield from _replaced_attention(mode)


def _replaced_attention(mode: Any) -> Iterator[None]:
    plain = F.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        with mode:
            return plain(*args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_attention = operation in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
