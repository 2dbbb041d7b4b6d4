"""How much memory is held and free, and what is refused because of it."""

from __future__ import annotations

import re
from mmap import mmap
from pathlib import Path

import psutil
import pytest
import torch

from qprobe.errors import MachineError
from qprobe.measure import memory
from qprobe.measure.memory import MemoryLimit, free_memory, held_bytes, peak_bytes
from qprobe.measure.weight_store import WeightStore
from tests.measure.test_weight_store import store_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB = 2**20


def group(
    folder: Path, most: str = "1000", used: str = "700", stat: str = "anon 5\ninactive_file 100\n"
) -> Path:
    """The files of a control group of a container."""
    for name, text in (("memory.max", most), ("memory.current", used), ("memory.stat", stat)):
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, (400,)),  # 1000 - 700, and 100 that are given up at once
        ({"stat": "anon 5\n"}, (300,)),
        ({"most": "max"}, ()),
        ({"used": "5000"}, (0,)),
        ({"most": "much"}, ()),
        ({"stat": "inactive_file\n"}, ()),
    ],
)
def test_a_container_leaves_what_its_limit_and_its_files_give(
    changes: dict[str, str], left: tuple[int, ...], tmp_path: Path
):
    assert memory._left_to_container(group(tmp_path, **changes)) == left
    assert memory._left_to_container(tmp_path / "none") == ()


def test_no_more_is_free_than_the_container_and_the_machine_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "_CGROUP", group(tmp_path))
    assert free_memory(CPU) == 400
    monkeypatch.setattr(memory, "_CGROUP", group(tmp_path, most=str(2**60)))
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total


def test_the_peak_of_this_process_is_what_it_held_once_and_holds_no_more():
    now = held_bytes(CPU)
    block = mmap(-1, 64 * MIB)  # of its own: the allocator may give memory that it kept
    block[::4096] = b"x" * (64 * MIB // 4096)  # pages are resident once they are written
    assert held_bytes(CPU) >= now + 60 * MIB
    assert peak_bytes(CPU) >= now + 60 * MIB  # the system counts pages in batches
    block.close()
    assert held_bytes(CPU) < now + 30 * MIB and peak_bytes(CPU) >= now + 60 * MIB


def test_a_gpu_remembers_the_highest_peak_of_all(monkeypatch: pytest.MonkeyPatch):
    peaks = iter([500, 500, 200, 200, 900, 900])
    monkeypatch.setattr(memory, "_earlier", {})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
    assert peak_bytes(GPU) == 500
    memory.restart_peak(GPU)
    assert (peak_bytes(GPU), peak_bytes(GPU, since_restart=True)) == (500, 200)
    assert (peak_bytes(GPU), peak_bytes(GPU, since_restart=True)) == (900, 900)


def test_what_a_gpu_gives_is_what_is_free_and_what_is_reserved_and_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (500, 1000))
    assert free_memory(GPU) == 540 and held_bytes(GPU) == 30


def limit_of(limit: int, device: torch.device = GPU, **changes: object) -> MemoryLimit:
    store: WeightStore = store_of({}, 0)[0]
    return MemoryLimit(limit, device, store, **changes)  # type: ignore[arg-type]


def test_work_beside_what_is_held_is_refused_one_byte_above_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "held_bytes", lambda _device: 600 * MIB)
    limit_of(1000 * MIB).check(400 * MIB, "it")
    with pytest.raises(MachineError) as refused:
        limit_of(1000 * MIB).check(400 * MIB + 1, "Rounding x")
    assert str(refused.value) == (
        "--max-memory 1,048,576,000 B is too little: Rounding x takes 1,048,576,001 B. Pass --max-memory "
        "1001MiB or more."
    )
    with pytest.raises(MachineError, match=r"Free some memory, or take a device with 1001MiB or more"):
        limit_of(1000 * MIB, is_found=True).check(400 * MIB + 1, "it")
    limit_of(1000 * MIB, CPU).check(400 * MIB - memory.LIBRARIES_BYTES, "it")
    with pytest.raises(MachineError):
        limit_of(1000 * MIB, CPU).check(400 * MIB + 1 - memory.LIBRARIES_BYTES, "it")


def test_the_least_that_is_named_for_work_would_do():
    limit = limit_of(1000 * MIB, base_bytes=300 * MIB)
    limit.check_room(limit.left_bytes, "it")
    with pytest.raises(MachineError, match="too little") as refused:
        limit.check_room(limit.left_bytes + MIB, "it")
    found = re.search(r"Pass --max-memory (\d+)MiB", str(refused.value))
    assert found is not None and 1001 <= int(found[1]) <= 1003
    limit_of(int(found[1]) * MIB, base_bytes=300 * MIB).check_room(limit.left_bytes + MIB, "it")


def test_a_limit_that_was_found_says_of_which_device():
    (said,) = limit_of(1000, is_found=True).note(1001)
    assert said == ("--max-memory 1,000 B (what cuda has free) was exceeded: the scan held up to 1,001 B.")


def test_a_cpu_forgets_what_work_took_that_was_given_up_and_nothing_more(monkeypatch: pytest.MonkeyPatch):
    peak = [3000 * MIB]
    monkeypatch.setattr(memory, "peak_bytes", lambda *_, **__: peak[0])
    monkeypatch.setattr(memory, "held_bytes", lambda _device: 500 * MIB)
    limit = limit_of(1000 * MIB, CPU)
    with pytest.raises(MachineError), limit.running("too large", 1):
        pass
    with pytest.raises(MachineError), limit.running("small", 1):
        pass
    limit.give_up()
    with limit.running("small", 1):
        pass
    assert limit.needed_by("small") == 500 * MIB
    with pytest.raises(MachineError), limit.running("larger", 1):
        peak[0] += MIB
