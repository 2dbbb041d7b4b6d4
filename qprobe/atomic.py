"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which becomes `path` at the end of the block; raises OSError.

    It is a temporary file in the same folder. Its name is new for each call, so that two writers of one file
    cannot mix; a killed writer leaves `.{name}.*.tmp` behind, which nobody reads.
    """
    with _beside(path) as temporary:
        with _synced(temporary) as file:
            yield file
        os.replace(temporary, path)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all, as `atomic_file` does; raises OSError."""
    with atomic_file(path) as file:
        file.write(data)


def write_first(path: Path, data: bytes) -> bool:
    """Write `data` to `path` as `write_atomic` does, unless it is there already; True if it was not.

    Of several writers exactly one gets True. Where a file system knows no links, the last one wins instead.
    """
    with _beside(path) as temporary:
        with _synced(temporary) as file:
            file.write(data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            os.replace(temporary, path)
        return True


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A fresh name for a temporary file beside `path`; the file is gone afterwards."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """The new file `path`, which is on the disk at the end of the block."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
