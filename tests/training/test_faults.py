"""A full disk is one sentence, out of torch's zip writer too; a batch that memory does not hold is halved."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe.errors import RunError
from qprobe.options import FinetuneOptions
from qprobe.training import alone
from qprobe.training.faults import disk_explained, in_smaller_batches

ASKED = FinetuneOptions("skiplist.json", data="train.jsonl", out="out", batch_size=6, accumulation=2)
full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")


@full
@pytest.mark.parametrize("size", [3, 10**6])
def test_a_full_disk_under_the_zip_writer_of_torch_is_one_sentence(size: int):
    with pytest.raises(RunError, match=r"out cannot be written \(.*\)\. Make room; the same command"):
        with disk_explained(Path("out")):
            torch.save(torch.ones(size), "/dev/full")


def test_what_is_not_of_the_disk_passes():
    for error in (RuntimeError("shapes"), OSError(errno.ENOENT, "gone")):
        with pytest.raises(type(error)) as found, disk_explained(Path("out")):
            raise error
        assert found.value is error


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 9"),
]


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_half_the_batch_takes_the_same_lines_in_a_step_from_the_same_adapter(error: Exception):
    model = torch.nn.Linear(2, 2)
    before, tried = model.weight.detach().clone(), []

    def train(asked: FinetuneOptions) -> dict[str, Any]:
        assert torch.equal(model.weight, before) and model.weight.grad is None
        tried.append((asked.batch_size, asked.accumulation))
        if asked.batch_size > 1:
            model(torch.ones(1, 2)).sum().backward()
            with torch.no_grad():
                model.weight += 1
            raise error
        return {"steps": 1}

    done, (said,) = in_smaller_batches(ASKED, model, train)
    assert done == {"steps": 1} and tried == [(6, 2), (3, 4), (1, 12)]
    assert "--batch-size 6, so 1 ran at once, and 12 batches" in said


def test_one_line_that_is_too_much_and_other_errors_end_the_run():
    for size, error in ((1, MemoryError()), (6, RuntimeError("shapes"))):

        def train(_: FinetuneOptions, error: Exception = error) -> dict[str, Any]:
            raise error

        with pytest.raises(type(error)):
            in_smaller_batches(replace(ASKED, batch_size=size), torch.nn.Linear(2, 2), train)


def test_a_run_that_begins_removes_what_killed_writers_left(tmp_path: Path):
    left = tmp_path / ".README.md.0123456789ab.tmp"
    left.write_bytes(b"half")
    (tmp_path / "finetune.json").write_bytes(b"{}")
    with alone.alone_in(tmp_path):
        assert not left.exists()
