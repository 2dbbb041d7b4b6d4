"""Files that somebody else may have written: run folders, manifests, checkpoints, samples, lists.

Each is a regular file of a size that its reader can hold; a pipe or a device would never end. Both are looked
at before it is opened and again once it is open, since a name can come to mean another file in between.
Symbolic links are followed: the cache of the hub is made of them.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from qprobe.errors import QprobeError

# Without O_NONBLOCK, opening a pipe would wait for a writer.
_PART = 2**22  # bytes of a file that are read at once
_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY")
)
_KINDS = (
    (stat.S_ISDIR, "it is a folder"),
    (stat.S_ISFIFO, "it is a pipe"),
    (stat.S_ISCHR, "it is a device"),
    (stat.S_ISBLK, "it is a device"),
    (stat.S_ISSOCK, "it is a socket"),
)


def open_foreign(path: Path, error: type[QprobeError], fix: str, limit: int | None) -> BufferedReader:
    """The regular file at `path`, open for reading.

    limit: largest size in bytes; None for files of any size, such as weights. Raises `error`, one sentence
    with what is wrong, and `fix`, a sentence that says what to do.
    """
    try:
        return _opened(path, limit)
    except (OSError, _RefusedError) as found:
        raise error(_sentence(path, found, fix)) from None


def read_foreign(path: Path, error: type[QprobeError], fix: str, limit: int) -> bytes:
    """What the regular file at `path` holds; arguments and errors as of `open_foreign`."""
    try:
        return _read(path, limit)
    except (OSError, _RefusedError) as found:
        raise error(_sentence(path, found, fix)) from None


def read_foreign_if_there(path: Path, error: type[QprobeError], fix: str, limit: int) -> bytes | None:
    """What `read_foreign` gives; None if there is no such file."""
    try:
        return _read(path, limit)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, _RefusedError) as found:
        raise error(_sentence(path, found, fix)) from None


def check_foreign(path: Path, error: type[QprobeError], fix: str, limit: int | None) -> None:
    """Raises as `open_foreign` does, before a library opens the file by its name."""
    open_foreign(path, error, fix, limit).close()


def is_plain_name(name: str) -> bool:
    """Whether `name` is that of a file in a folder, and of nothing else, on every system."""
    is_one = name not in ("", ".", "..") and not any(x in name for x in "/\\:")
    return is_one and name.isprintable() and len(name.encode("utf-8", "replace")) <= 255


class _RefusedError(Exception):
    """Why a file is not read."""


def _opened(path: Path, limit: int | None) -> BufferedReader:
    try:
        found = os.stat(path)
    except ValueError:  # of a name with a zero byte or half a character in it
        raise _RefusedError("it is no name of a file") from None
    _check(found, limit)
    descriptor = os.open(path, _FLAGS)
    try:
        _check(os.fstat(descriptor), limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _read(path: Path, limit: int) -> bytes:
    data = bytearray()
    with _opened(path, limit) as file:
        # A part at a time: a read of `limit` bytes would first ask for as much memory.
        while len(data) <= limit and (part := file.read(min(_PART, limit + 1 - len(data)))):
            data += part
    if len(data) > limit:  # it grew, or its size is not known before it is read
        raise _too_large(limit)
    return bytes(data)


def _check(found: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = next((said for is_kind, said in _KINDS if is_kind(found.st_mode)), "it is no regular file")
        raise _RefusedError(what)
    if limit is not None and found.st_size > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> _RefusedError:
    shown = f"{limit // 2**20:,} MiB" if limit >= 2**20 else f"{limit:,} bytes"
    return _RefusedError(f"it is larger than {shown}")


def _sentence(path: Path, found: OSError | _RefusedError, fix: str) -> str:
    why = found.strerror or found if isinstance(found, OSError) else found
    return f"{path} cannot be read ({why}). {fix}"
