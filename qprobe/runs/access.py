"""Reading and writing files of a run folder: whole or not at all, and by one process where it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qprobe.errors import RunError
from qprobe.system.files import write_atomic
from qprobe.system.foreign import read_foreign_if_there
from qprobe.system.locks import open_lock, wait_for_lock

MOST_BYTES = 2**31
"""A file of a run folder that is larger is none of ours: a unit has a row per layer and sample."""


def read_file(path: Path) -> bytes | None:
    """What a file of a run folder holds, None if there is none; RunError if it cannot be read."""
    return read_foreign_if_there(path, RunError, "Make it a readable file.", MOST_BYTES)


def write_file(path: Path, data: bytes, how: Callable[[Path, bytes], object] = write_atomic) -> None:
    """Write a file of a run folder whole or not at all; raises RunError if the disk refuses."""
    try:
        how(path, data)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def one_at_a_time(folder: Path, lock_name: str) -> Iterator[None]:
    """While open, no other process is in here; raises RunError if the folder cannot be written."""
    try:
        lock = open_lock(folder / lock_name)
    except OSError as error:
        raise cannot_write(folder, error) from error
    with lock:
        wait_for_lock(lock)
        yield


def cannot_write(path: Path, error: OSError) -> RunError:
    """The error that tells a user that `path` cannot be written, and why."""
    return RunError(
        f"{path} cannot be written ({error.strerror or error}). Make room or pass another --out; "
        "what is finished stays, and the same command resumes it."
    )
