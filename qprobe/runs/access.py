"""Reading and writing files of a run folder: whole or not at all, and by one process where it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qprobe.errors import RunError
from qprobe.system.files import write_atomic
from qprobe.system.foreign import read_foreign_if_there
from qprobe.system.locks import open_lock, wait_for_lock

MOST_BYTES = 48 * 2**20
"""Of a JSON or CSV file: Python takes up to 21 times as much for the values in it, which is 1 GiB; `[],` is 3
bytes there and 64 here. Ours have some 400 bytes per layer, or 40 kB per sample that is shown."""


def read_file(path: Path, limit: int = MOST_BYTES) -> bytes | None:
    """What a file of a run folder holds, None if there is none; RunError if it cannot be read.

    limit: largest size in bytes.
    """
    return read_foreign_if_there(path, RunError, "Make it a readable file.", limit)


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
