"""Gram matrices of all blocks of a model in one walk: every block runs once more, and only one at a time.

A pass over the samples records what each block is called with. Most of it is what the block before put out,
which is not kept: the block before runs again first, and hands it on. So what is held is the inputs of the
first block of each tower and the masks and positions that blocks share; and the matrices are those of the
blocks that run together, where a pass of the whole model sums as many as fit. The numbers are the same: every
operation is that of the whole model, on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from qprobe.calibration.gram import Gathering, SharedInput, Weights, gram_bytes, passes, tiles_that_count
from qprobe.inputs.batch import Batch
from qprobe.loading.experts.weights import Layer
from qprobe.measure.attribution import walking
from qprobe.measure.hooks import repeated_blocks, replaced_forwards, wrapped_blocks
from qprobe.measure.subject import Subject


@dataclass(frozen=True)
class _Kept:
    """A tensor that is held, maybe on the host, and the device where it is needed."""

    tensor: Tensor
    device: torch.device


@dataclass(frozen=True)
class _PutOut:
    """Tensor number `place` of what block number `block` put out when it ran first."""

    block: int
    place: int


@dataclass
class _Recorded:
    """One batch, without its inputs, and (args, kwargs) of the calls of each block, tensors replaced."""

    batch: Batch
    tiles: Tensor | None
    calls: dict[int, list[Any]] = field(default_factory=dict)
    last_use: dict[_PutOut, int] = field(default_factory=dict)  # the number of the last block that reads it
    handed_on: dict[_PutOut, Tensor] = field(default_factory=dict)

    def filled(self, value: Any) -> Any:
        """`value` with the tensor in place of what stands for it."""
        if isinstance(value, _PutOut):
            return self.handed_on[value]
        return value.tensor.to(value.device) if isinstance(value, _Kept) else value

    def hand_on(self, number: int, output: Any) -> None:
        """Keep of the `output` of block number `number` what later blocks read."""
        for place, tensor in enumerate(_tensors(output)):
            key = _PutOut(number, place)
            if key in self.last_use:
                self.handed_on[key] = tensor


def can_walk(subject: Subject) -> bool:
    """False where recorded tensors would count for a memory limit as weights that wait do not."""
    return subject.limit is None or subject.reference.device.type != "cpu"


class Walk:
    """What the blocks of a model were called with, batch by batch; see the module's first lines.

    room_bytes: what may be held on the devices; the rest waits on the host.
    """

    def __init__(self, subject: Subject, room_bytes: int) -> None:
        self.subject = subject
        self.blocks = repeated_blocks(subject.model)
        self.room_bytes = room_bytes
        self.recorded: list[_Recorded] = []
        self._layers = [_layers(block, subject) for block in self.blocks]
        self._on_device = self._on_host = 0

    def by_block(self, inputs: Iterable[SharedInput]) -> tuple[list[SharedInput], list[list[SharedInput]]]:
        """(those of `inputs` that are read outside of blocks or in several, those of each block)."""
        owners = {name: number for number, layers in enumerate(self._layers) for name in layers}
        outside: list[SharedInput] = []
        inside: list[list[SharedInput]] = [[] for _ in self.blocks]
        for one in inputs:
            places = {owners.get(name) for name in one.names}
            place = places.pop()
            (outside if places or place is None else inside[place]).append(one)
        return outside, inside

    def record(
        self, gathering: Gathering, batches: Iterable[Batch], count: int, done: Callable[[], None]
    ) -> bool:
        """Run the model on `count` `batches` for `gathering`, and keep what the blocks are called with.

        False if that would fill more than half of the host: then nothing is kept.
        """
        is_room = True
        for batch in batches:
            self.recorded.append(_Recorded(replace(batch, inputs={}), tiles_that_count(batch)))
            recorder = _Recorder(self.recorded[-1], self._keep)
            with wrapped_blocks(self.blocks if is_room else [], recorder.wrapped):
                gathering.add(batch)
            left = psutil.virtual_memory().available // 2
            is_room = is_room and self._on_host * count <= left * len(self.recorded)
            if not is_room:
                self.recorded.clear()
            done()
        return is_room

    def run(self, number: int, gathering: Gathering, done: Callable[[], None]) -> None:
        """Run block number `number` on all batches for `gathering`; those before it have run."""
        for index, one in enumerate(self.recorded):
            forward = gathering.forward(one.batch, index, one.tiles)
            running = self.subject.running(f"walk, {gathering.kind}", one.batch.kinds.numel())
            with running, torch.no_grad(), replaced_forwards(self._layers[number], forward):
                for call, recorded in enumerate(one.calls.get(number, [])):
                    args, kwargs = tree_map(one.filled, recorded)
                    output = self.blocks[number](*args, **kwargs)
                    if call == 0:
                        one.hand_on(number, output)
            done()

    def leave(self, number: int) -> None:
        """Let go of what only block number `number` and those before it need."""
        for one in self.recorded:
            one.calls.pop(number, None)
            for key in [key for key in one.handed_on if one.last_use[key] <= number]:
                del one.handed_on[key]

    def _keep(self, tensor: Tensor) -> _Kept:
        own, device = tensor.detach(), tensor.device
        if any(step == 0 and size > 1 for step, size in zip(own.stride(), own.shape, strict=True)):
            return _Kept(own, device)  # expanded: a copy would be larger, and nothing writes into it
        if device.type != "cpu" and self._on_device + own.nbytes <= self.room_bytes:
            self._on_device += own.nbytes
            return _Kept(own.clone(), device)
        self._on_host += own.nbytes
        return _Kept(own.clone() if device.type == "cpu" else own.cpu(), device)


class _Recorder:
    """Notes the calls of blocks while one batch runs."""

    def __init__(self, into: _Recorded, keep: Callable[[Tensor], _Kept]) -> None:
        self._into, self._keep = into, keep
        # By the id of a tensor: a weak reference, its version, and what stands for it.
        self._known: dict[int, tuple[Any, int, Any]] = {}

    def wrapped(self, number: int, block: nn.Module) -> Callable[..., Any]:
        """The forward of block number `number`; it notes its arguments and what its first call puts out."""
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            is_first = number not in self._into.calls
            call = tree_map(lambda x: self._standing_for(x, number if is_first else -1), (args, kwargs))
            self._into.calls.setdefault(number, []).append(call)
            output = forward(*args, **kwargs)
            if is_first:
                for place, tensor in enumerate(_tensors(output)):
                    self._known[id(tensor)] = (ref(tensor), tensor._version, _PutOut(number, place))
            return output

        return run

    def _standing_for(self, value: Any, block: int) -> Any:
        """What is recorded of `value` as an argument of block number `block`, which runs first; else -1.

        Blocks run again in the order of their numbers, each as often as it ran, so that only what an earlier
        number put out, when it ran first, can be handed on.
        """
        if not isinstance(value, Tensor):
            return value
        found, version, known = self._known.get(id(value), (lambda: None, 0, None))
        if found() is not value or version != value._version:
            known = None  # of a tensor that had this id before, or of what this one held then
        if isinstance(known, _Kept):
            return known
        if isinstance(known, _PutOut) and known.block < block:
            self._into.last_use[known] = max(block, self._into.last_use.get(known, 0))
            return known
        kept = self._keep(value)
        if known is None:
            self._known[id(value)] = (ref(value), value._version, kept)
        return kept


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_flatten(output)[0] if isinstance(x, Tensor)]


def _layers(block: nn.Module, subject: Subject) -> dict[str, Layer]:
    """The layers of `block`, fused experts as well, by name."""
    inside = {id(module) for module in block.modules()}
    owners = {name: x if isinstance(x, nn.Linear) else x.module for name, x in subject.modules.items()}
    return {name: layer for name, layer in subject.modules.items() if id(owners[name]) in inside}


@dataclass(frozen=True)
class Plan:
    """What runs for the matrices of some inputs, each item with those that it gathers.

    passes: of the whole model, the first of which records the calls of blocks if there are any `blocks`:
    groups of blocks, by number, whose matrices are held at once.
    """

    passes: list[list[SharedInput]]
    blocks: list[list[tuple[int, list[SharedInput]]]]

    @property
    def runs(self) -> int:
        """How often all samples run, through the model or a block."""
        return len(self.passes) + sum(len(group) for group in self.blocks)


def planned(walk: Walk | None, inputs: Sequence[SharedInput], limit_bytes: int, device: torch.device) -> Plan:
    """The plan for `inputs`, of whose matrices `limit_bytes` are held at once; walk: None to pass only."""
    outside, inside = (list(inputs), []) if walk is None else walk.by_block(inputs)
    wanted = [number for number, members in enumerate(inside) if members]
    groups: list[list[tuple[int, list[SharedInput]]]] = []
    room = 0
    for number in range(max(wanted, default=-1) + 1):
        for part in passes(inside[number], limit_bytes, device) or [[]]:
            size = sum(gram_bytes(one.in_features, device) for one in part)
            if not groups or size > room:
                groups.append([])
                room = limit_bytes
            groups[-1].append((number, part))
            room -= size
    return Plan(passes(outside, limit_bytes, device) or [[]][: len(groups)], groups)


def gathered_in_turn(
    subject: Subject,
    walk: Walk | None,
    plan: Plan,
    batches: Callable[[], Iterable[Batch]],
    count: int,
    weights: Weights | None = None,
    done: Callable[[], None] = lambda: None,
) -> Iterator[Gathering]:
    """The matrices of `plan`, item by item; whenever one is given out, the model is in its own dtype.

    walk: that `plan` was made with. batches: gives the samples, in `count` batches, each time from the first.
    done: called after each batch of each run.
    """
    is_recorded = False
    for part in plan.passes:
        gathering = Gathering(subject, part, weights)
        with walking(subject.path):
            if walk is not None and plan.blocks and part is plan.passes[0]:
                is_recorded = walk.record(gathering, batches(), count, done)
            else:
                gathering.add_all(batches(), done)
        yield gathering
    runs = [number for group in plan.blocks for number, _ in group]
    for group in plan.blocks:
        gathering = Gathering(subject, [one for _, part in group for one in part], weights)
        with walking(subject.path):
            if walk is None or not is_recorded:
                gathering.add_all(batches(), done)
            else:
                for number, _ in group:
                    walk.run(number, gathering, done)
                    runs.pop(0)
                    if number not in runs[:1]:
                        walk.leave(number)
        yield gathering
