"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qprobe.system.locks import try_lock

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")

# Where a file system knows no locks, a temporary file this old belongs to a writer that was killed.
_STALE_SECONDS = 3600


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which becomes `path` at the end of the block; raises OSError.

    It is a temporary file in the same folder. Its name is new for each call, so that two writers of one file
    cannot mix; a killed writer leaves `.{name}.*.tmp` behind, which nobody reads (see `remove_left_behind`).
    """
    with _beside(path) as (temporary, file):
        yield file
        _sync(file)
        os.replace(temporary, path)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all, as `atomic_file` does; raises OSError."""
    with atomic_file(path) as file:
        file.write(data)


def write_first(path: Path, data: bytes) -> bool:
    """Write `data` to `path` as `write_atomic` does, unless it is there already; True if it was not.

    Of several writers exactly one gets True. Where a file system knows no links, the last one wins instead.
    """
    with _beside(path) as (temporary, file):
        file.write(data)
        _sync(file)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            os.replace(temporary, path)
        return True


def make_named_folder(path: Path) -> None:
    """Makes the folder `path` that a user named, and those above it, if it is not there; it may be a link.

    Raises OSError, which names what stands in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        there = next(x for x in (path, *path.parents) if os.path.lexists(x))
        raise OSError(error.errno, f"{there} is no folder", str(path)) from error


def make_folder(path: Path) -> None:
    """Makes the folder `path`, and those above it, if it is not there. Raises OSError.

    Also where a symbolic link stands in its place: in a run folder from elsewhere it could lead anywhere.
    """
    make_named_folder(path)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link to another folder", str(path))


def remove_left_behind(folder: Path) -> None:
    """Remove temporary files in `folder` and its folders whose writers were killed; of living ones they stay.

    The system lets go of a writer's lock when its process ends, however it ends. Raises OSError.
    """
    inner = [x for x in folder.iterdir() if x.is_dir() and not x.is_symlink()] if folder.is_dir() else []
    found = [path for place in (folder, *inner) for path in place.glob(".*.tmp")]
    for path in [x for x in found if _TEMPORARY.fullmatch(x.name) and x.is_file() and not x.is_symlink()]:
        # Another process may give it its own name meanwhile.
        with suppress(FileNotFoundError), open(path, "r+b") as file:
            is_free = try_lock(file)
            if is_free is None:
                is_free = time.time() - path.stat().st_mtime > _STALE_SECONDS
            if is_free:
                path.unlink()


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new temporary file beside `path`, locked while it is open; it is gone afterwards."""
    temporary, file = _begun(path)
    with file:
        try:
            yield temporary, file
        finally:
            temporary.unlink(missing_ok=True)


def _begun(path: Path) -> tuple[Path, BinaryIO]:
    """A temporary file that is open and locked; another one where it was removed before it was locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        file = open(temporary, "xb")
        if try_lock(file) is not False and temporary.exists():
            return temporary, file
        file.close()


def _sync(file: BinaryIO) -> None:
    """Put the file on the disk."""
    file.flush()
    os.fsync(file.fileno())
