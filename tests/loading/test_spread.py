"""When a model is spread over several GPUs, and how much of it each may take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qprobe.errors import MachineError
from qprobe.loading.spread import (
    GIB,
    check_layout,
    devices_of,
    is_too_large,
    needed_bytes,
    room_for_weights,
)


def test_a_model_needs_its_weights_and_a_4_bit_form_beside_each() -> None:
    # 1,000 weights in 16-bit are 2,000 B; two codes a byte and a float32 scale for 64 are 562.5 B more.
    model = nn.Linear(100, 10, bias=False, dtype=torch.bfloat16, device="meta")
    assert needed_bytes(model) == 2562


def test_tied_weights_count_once() -> None:
    model = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)])
    model[1].weight = model[0].weight
    assert needed_bytes(model) == needed_bytes(model[0])


@pytest.mark.parametrize(("needed", "spread"), [(13 * GIB, False), (15 * GIB, True)])
def test_the_first_card_must_have_room_for_a_batch_as_well(needed: int, spread: bool) -> None:
    assert is_too_large(needed, {0: 24 * GIB, 1: 80 * GIB}) == spread


def test_each_card_takes_what_leaves_room_for_4_bit_forms_and_a_batch() -> None:
    room = room_for_weights(30 * GIB, {0: 24 * GIB, 1: 16 * GIB})
    assert room == {0: 22 * GIB * 32 // 41, 1: 14 * GIB * 32 // 41}


def test_too_few_cards_are_refused_with_what_is_needed_and_what_would_do() -> None:
    with pytest.raises(
        MachineError, match=r"takes 40\.0 GiB .* 2 GPUs here have 36\.0 GiB .*--max-memory 18432MiB"
    ):
        room_for_weights(40 * GIB, {0: 20 * GIB, 1: 20 * GIB})


def test_a_layout_that_leaves_a_part_on_the_host_is_refused() -> None:
    check_layout({"vision": 0, "language": 1})
    with pytest.raises(MachineError, match="layers 7 would stay on the host"):
        check_layout({"vision": 0, "layers 7": "cpu"})


def test_devices_come_in_the_order_in_which_parameters_have_them() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert devices_of(model) == (torch.device("cpu"), torch.device("meta"))
