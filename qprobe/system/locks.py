"""Locks of files between processes, which the system lets go of when a process ends, however it ends.

filelock takes the exclusive ones, on a descriptor: a file that is written and renamed while it is locked has
no lasting path to lock by. Shared locks are ours: filelock's are kept in a database of their own, of which an
exclusive lock of the same file knows nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import lock_descriptor

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # of a file system that has none
_FLAGS = (os.O_RDWR | os.O_CREAT) | sum(
    getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
)


def open_lock(path: Path) -> BinaryIO:
    """The lock file at `path`, open for reading and writing; made if it is missing.

    Over NFS a shared lock wants a file that can be read, an exclusive one a file that can be written. Raises
    OSError, also where a symbolic link, a pipe or a device stands in its place.
    """
    descriptor = os.open(path, _FLAGS, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "r+b")


def try_lock(file: BinaryIO | int) -> bool | None:
    """Whether `file`, open, is locked now and not held by another process; None where locks are unknown.

    Raises OSError for anything else that is in the way.
    """
    try:
        return lock_descriptor(file if isinstance(file, int) else file.fileno(), blocking=False)
    except OSError as error:
        return _unknown(error)


def wait_for_lock(file: BinaryIO) -> None:
    """Locks `file`, open, once no other process holds it; at once where locks are unknown. Raises OSError."""
    try:
        lock_descriptor(file.fileno())
    except OSError as error:
        _unknown(error)


@contextmanager
def held_alone(path: Path) -> Iterator[bool]:
    """Whether this process alone holds the lock file `path` while open; it is removed by whoever held it.

    True where locks are unknown. Raises OSError as `open_lock` does.
    """
    with open_lock(path) as file:
        is_held = _is_ours(file, path)
        try:
            yield is_held
        finally:
            if is_held:
                path.unlink(missing_ok=True)


def _is_ours(file: BinaryIO, path: Path) -> bool:
    """False if another process has the lock, or had it and removed the file since this one opened it."""
    found = try_lock(file)
    if not found:
        return found is None
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def try_share(file: BinaryIO) -> bool | None:
    """Whether `file`, open, is locked now together with others that share it, and not held by one alone.

    None where locks, or shared ones, are unknown (Windows). Raises OSError as `try_lock` does.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return _unknown(error)
    return True


def _unknown(error: OSError) -> None:
    """Raises `error` unless it says that the file system has no locks."""
    if error.errno not in _NO_LOCKS:
        raise error
