"""Memory of a scan in bytes: what is held, its peak, and keeping it within a limit.

What a kind of work needs beside the weights is measured, not guessed: its first batch runs with every
streamed weight on the host, and what it leaves of the limit is given to weights from the next batch on.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil
import torch

from qprobe.errors import MachineError
from qprobe.measure.weight_store import WeightStore

SPARE = 0.03  # of the limit: batches of one size differ by rounding of allocations, libraries by workspaces
LIBRARIES_BYTES = 64 * 2**20  # that a process has yet to load to choose and to draw, 40 MiB as measured
_earlier: dict[torch.device, int] = {}  # the highest peak of each CUDA device before its last restart


def peak_bytes(device: torch.device, since_restart: bool = False) -> int:
    """The most memory held at once: allocated on a CUDA `device`, or resident in this process.

    since_restart: from the last `restart_peak` on, and not from the start of the process.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        return peak if since_restart else max(peak, _earlier.get(device, 0))
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with the peak of the process that started this one
        found = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), None)
        if found is not None:
            return int(found.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # others count in KiB


def restart_peak(device: torch.device) -> None:
    """Begin a new peak on a CUDA `device`; a process's own peak cannot be reset."""
    if device.type == "cuda":
        _earlier[device] = peak_bytes(device)
        torch.cuda.reset_peak_memory_stats(device)


def held_bytes(device: torch.device) -> int:
    """Memory held now: allocated on a CUDA `device`, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def free_memory(device: torch.device) -> int:
    """Bytes that the device can still give, with those that PyTorch holds on a GPU but does not use.

    On the CPU no more than what is left to this process's container.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min((psutil.virtual_memory().available, *_left_to_container(_CGROUP)))


_CGROUP = Path("/sys/fs/cgroup")  # of the container, as it sees itself (version 2)


def _left_to_container(folder: Path) -> tuple[int, ...]:
    """What the memory limit of a control group leaves; nothing where there is none.

    Pages of files that were not used lately count as used, but are given up at once.
    """
    try:
        most, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        unused = next((int(x[1]) for x in rows if x[0] == "inactive_file"), 0)
        return () if most == "max" else (max(0, int(most) - int(used) + unused),)
    except (OSError, ValueError, IndexError):
        return ()


@dataclass
class MemoryLimit:
    """The most memory that a scan may hold on `device`: allocated on CUDA, of the whole process on the CPU.

    On the CPU no weight stays, since a copy costs little beside a product there. Its peak cannot begin
    again, so there a batch is refused for what an earlier one took as well, but for work that was given up.
    base_bytes: held before any batch ran, no streamed weight among them.
    is_found: that it is what the device has free, and not what a user asked for.
    """

    limit_bytes: int
    device: torch.device
    store: WeightStore
    base_bytes: int = 0
    is_found: bool = False
    _needed: dict[str, tuple[int, int]] = field(default_factory=dict)  # kind -> (bytes, size of the batch)
    _given_up: int = 0  # peak of the process by then

    def check(self, working_bytes: int, what: str) -> None:
        """Raises MachineError if what is held now and `working_bytes` are beyond the limit; what: a name."""
        self._refuse_below(held_bytes(self.device) + working_bytes + self.later_bytes, what)

    def check_room(self, working_bytes: int, what: str) -> None:
        """Raises MachineError if `working_bytes` are more than `left_bytes`; what: names the work."""
        if working_bytes > self.left_bytes:
            least = (self.base_bytes + self.later_bytes + working_bytes) / (1 - SPARE)
            self._refuse_below(int(least) + 1, what)

    @property
    def later_bytes(self) -> int:
        """What the process will hold later beside any batch."""
        return LIBRARIES_BYTES if self.device.type == "cpu" else 0

    def give_up(self) -> None:
        """Let what work took that ended for want of memory count no more; it must hold none by now."""
        if self.device.type == "cpu":
            self._given_up = peak_bytes(self.device)

    def note(self, peak: int) -> tuple[str, ...]:
        """A sentence if the scan held more than the limit after all; peak: the most that it held."""
        if peak <= self.limit_bytes:
            return ()
        limit = f"--max-memory {self.limit_bytes:,} B"
        return (f"{limit}{self._found} was exceeded: the scan held up to {peak:,} B.",)

    @property
    def _found(self) -> str:
        """Where the limit comes from, in brackets, if no user gave it."""
        return f" (what {self.device} has free)" if self.is_found else ""

    def _refuse_below(self, least: int, what: str) -> None:
        if least > self.limit_bytes:
            self._refuse(f"{what} takes {least:,} B", least, "")

    def _refuse(self, why: str, least: int, other: str) -> NoReturn:
        """Raises MachineError. other: what else would do."""
        more = "Free some memory, or take a device with" if self.is_found else "Pass --max-memory"
        raise MachineError(
            f"--max-memory {self.limit_bytes:,} B{self._found} is too little: {why}. {more} "
            f"{_rounded_up(least)} or more{other}."
        )

    @contextmanager
    def running(self, kind: str, size: int, like: str = "") -> Iterator[None]:
        """Open around one batch of a kind of work; size: of the batch, that memory grows in proportion to.

        like: a kind that takes no less, so that what it took stands in for the first batch of this one.
        Raises MachineError if its first batch did not fit, with the least that would do.
        """
        needed = self._needed.get(kind, self._needed.get(like))
        self.store.allow(self._room(needed, size))
        restart_peak(self.device)
        yield
        peak = peak_bytes(self.device, since_restart=True)
        if peak <= self._given_up:  # of this batch no more is known than what it leaves
            peak = held_bytes(self.device)
        if needed is None and peak + self.later_bytes > self.limit_bytes:
            least = int(peak * (1 + SPARE)) + self.later_bytes
            later = f", and {self.later_bytes:,} B are for what is loaded later" if self.later_bytes else ""
            why = f"a batch took {peak:,} B with every weight streamed{later}"
            self._refuse(why, least, ", or a smaller --batch-size")
        beside = max(0, peak - self.store.resident_bytes - self.base_bytes)
        most, largest = self._needed.get(kind, (0, 0))
        self._needed[kind] = max(beside, most), max(size, largest)

    @property
    def left_bytes(self) -> int:
        """What the limit leaves beside what is always held, for weights and for work."""
        return self.limit_bytes - int(SPARE * self.limit_bytes) - self.base_bytes - self.later_bytes

    def needed_by(self, kind: str) -> int:
        """Bytes that a batch of this kind took beside weights that stay and what is always held."""
        return self._needed[kind][0]

    def _room(self, needed: tuple[int, int] | None, size: int) -> int:
        """Bytes of weights that may stay on the device while a batch of `size` runs."""
        if needed is None or self.device.type == "cpu":
            return 0
        found, found_at = needed
        return max(0, self.left_bytes - int(found * max(1.0, size / found_at)))


def _rounded_up(count: int) -> str:
    """`count` bytes in MiB, rounded up, as an option takes it."""
    return f"{-(-count // 2**20)}MiB"
