"""Blocks that run again in the backward pass: the same gradients, and attention only once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qprobe.measure.attribution import walking
from qprobe.measure.hooks import _ATTENTION, checkpointed_blocks, repeated_blocks
from qprobe.measure.kl import read_out
from tests.measure.conftest import WITH_HEAD, Case

CaseOf = Callable[[str], Case]
NO_ROOM, ANY_ROOM = 0, 2**50


class Kernels(TorchDispatchMode):
    """Counts the operations that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.runs[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def attention(self) -> int:
        return sum(count for operation, count in self.runs.items() if operation in _ATTENTION)

    @property
    def products(self) -> int:
        return self.runs[torch.ops.aten.mm.default] + self.runs[torch.ops.aten.addmm.default]


def slopes_with_room(case: Case, room: int) -> tuple[dict[str, torch.Tensor], Kernels]:
    """Slopes of the first sample at alpha = 0.4, and what ran for them."""
    subject = case.subject
    path = replace(subject.path, room_bytes=room)
    batch = subject.encode(case.samples[:1])
    with walking(path), Kernels() as kernels:
        with torch.no_grad():
            plain = read_out(subject.model, batch)
        kernels.runs.clear()
        return path.slopes(batch, plain, 0.4), kernels


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_HEAD)
def test_running_blocks_again_changes_no_slope_and_runs_attention_once(case: CaseOf, name: str) -> None:
    kept, once = slopes_with_room(case(name), ANY_ROOM)
    again, twice = slopes_with_room(case(name), NO_ROOM)
    assert again.keys() == kept.keys()
    for layer, slope in kept.items():
        torch.testing.assert_close(again[layer], slope, rtol=1e-4, atol=1e-7)
    assert twice.products > once.products  # blocks did run again
    assert twice.attention == once.attention > 0


@pytest.mark.slow
def test_what_fits_is_kept_and_the_rest_runs_again(case: CaseOf) -> None:
    found = case("llama")
    blocks = repeated_blocks(found.subject.model)
    _, none = slopes_with_room(found, NO_ROOM)
    _, every = slopes_with_room(found, ANY_ROOM)
    tokens = found.subject.encode(found.samples[:1]).inputs["input_ids"].shape[1]
    linears = [m for m in blocks[0].modules() if isinstance(m, torch.nn.Linear)]
    features = sum(m.in_features + m.out_features for m in linears)
    one_block = (2 * tokens * features + 2 * sum(m.weight.numel() for m in linears)) * 4
    _, first = slopes_with_room(found, one_block)
    assert every.products < first.products < none.products


def test_attention_and_blocks_are_as_before_after_an_exception(case: CaseOf) -> None:
    model = case("llama").subject.model
    plain = F.scaled_dot_product_attention
    with pytest.raises(RuntimeError, match="inside"), checkpointed_blocks(model, NO_ROOM):
        raise RuntimeError("inside")
    assert F.scaled_dot_product_attention is plain
    assert all("forward" not in block.__dict__ for block in repeated_blocks(model))
