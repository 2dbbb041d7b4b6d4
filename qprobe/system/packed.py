"""Foreign files that are compressed: gzip is read as what it holds, other kinds of packing are named."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from qprobe.errors import QprobeError
from qprobe.system.foreign import open_foreign

_GZIP = b"\x1f\x8b"
_HEAD = 262  # bytes; what tells a tar archive is at 257
_PACKED = (
    (b"PK\x03\x04", "a zip archive or a spreadsheet"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ", "compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"SQLite format 3", "an SQLite database"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow file"),
    (b"PAR1", "a Parquet file, whose name ends in .parquet"),
    (b"\x93NUMPY", "an array of numpy"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file, which git lfs pull fetches"),
)
"""How files begin that hold rows in a way that is not read, and what is said of them."""
_LARGEST = 2**30  # bytes that are held of a file of gzip, which may hold a thousand times its own size
_PART = 2**22  # bytes that are unpacked at once


@contextmanager
def unpacked(path: Path, error: type[QprobeError], fix: str) -> Iterator[BinaryIO]:
    """The regular file at `path`, open for reading what it holds, also where it is compressed by gzip.

    Raises `error` as `open_foreign` does, and for a file of another kind of packing or damaged gzip.
    """
    with open_foreign(path, error, fix, None) as file:
        _refuse_packed(path, file, error, fix)
        try:
            if file.peek(2)[:2] == _GZIP:
                with gzip.GzipFile(fileobj=file) as inside:
                    yield inside  # pyright: ignore[reportReturnType]
            else:
                yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as found:
            raise error(f"{path} is a damaged gzip file ({found}). {fix}") from None


def read_unpacked(path: Path, error: type[QprobeError], fix: str, limit: int) -> bytes:
    """What the file at `path` holds; errors as of `unpacked`, and for more than `limit` bytes, or 1 GiB of
    gzip."""
    data = bytearray()
    with unpacked(path, error, fix) as file:
        limit = min(limit, _LARGEST) if isinstance(file, gzip.GzipFile) else limit
        while len(data) <= limit and (part := file.read(min(_PART, limit + 1 - len(data)))):
            data += part
    if len(data) > limit:
        raise error(f"{path} holds more than {limit // 2**20:,} MiB. {fix}")
    return bytes(data)


def _refuse_packed(path: Path, file: BufferedReader, error: type[QprobeError], fix: str) -> None:
    head = file.peek(_HEAD)[:_HEAD]
    what = next((said for begins, said in _PACKED if head.startswith(begins)), None)
    if what is None and head[257:262] == b"ustar":
        what = "a tar archive"
    if what is not None:
        raise error(f"{path} is {what}, and is not read as it is. Unpack or convert it. {fix}")
