"""One fine-tuning run a folder at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qprobe.errors import RunError
from qprobe.system.locks import open_lock, try_lock

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While open, no other process trains into `folder`; a folder that is empty afterwards is removed.

    The system lets go of the lock when a process ends, however it ends. Raises RunError if another process
    holds it, or the folder cannot be made.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_lock(path)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}). Pass another folder.") from error
    with file:
        if not _locked(file, path):
            raise RunError(
                f"Another process is training into {folder}. Wait for it to end, or pass another --out."
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def _locked(file: BinaryIO, path: Path) -> bool:
    """False if another process has the lock, or had it and removed the file since this one opened it."""
    found = try_lock(file)
    if not found:
        return found is None  # a file system without locks
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
