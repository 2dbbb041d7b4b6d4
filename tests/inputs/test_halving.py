"""A batch that memory does not hold runs in halves, and what it gives stays the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from qprobe.inputs.halving import Halving

ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("CUDA error: out of memory"),
]


def holding(most: int, tried: list[int], error: Exception):
    def work(part: Sequence[int]) -> list[int]:
        tried.append(len(part))
        if len(part) > most:
            raise error
        return [10 * x for x in part]

    return work


@pytest.mark.parametrize("error", ERRORS)
def test_parts_come_in_order_and_the_next_batch_begins_with_what_ran(error: Exception):
    halving, tried = Halving(), list[int]()
    work = holding(2, tried, error)
    found = halving.run("kl", range(7), work)
    assert [x for _, part in found for x in part] == [10 * x for x in range(7)]
    assert [list(part) for part, _ in found] == [[0, 1], [2, 3], [4, 5], [6]]
    assert tried == [7, 4, 2, 2, 2, 1]
    tried.clear()
    halving.run("kl", range(4), work)
    assert tried == [2, 2]
    assert halving.notes[0].startswith("Memory did not suffice for batches of 7, so they ran in parts (2 at")
    halving.run("other", range(2), work)
    assert len(halving.notes) == 1 and "other" not in halving.notes[0]


def test_one_item_that_is_too_much_and_other_errors_are_raised():
    for most, error in ((0, MemoryError()), (1, RuntimeError("shapes"))):
        with pytest.raises(type(error)):
            Halving().run("kl", range(3), holding(most, [], error))


def test_work_on_all_groups_begins_over_with_all_of_them_in_halves():
    halving, tried = Halving(), list[list[int]]()

    def work(groups: Sequence[Sequence[int]]) -> int:
        tried.append([len(group) for group in groups])
        if max(tried[-1]) > 1:
            raise MemoryError
        return sum(map(sum, groups))

    assert halving.run_all("calibration", [[1, 2, 3], [4]], work) == 10
    assert tried == [[3, 1], [2, 1, 1], [1, 1, 1, 1]] and halving.most == {"calibration": (1, 3)}
    assert Halving().notes == ()
