"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` by way of a temporary file in the same folder; raises OSError.

    The temporary name is new for each call, so that two writers of one file cannot mix; a killed writer
    leaves `.{name}.*.tmp` behind, which nobody reads.
    """
    with _written(path, data) as temporary:
        os.replace(temporary, path)


def write_first(path: Path, data: bytes) -> bool:
    """Write `data` to `path` as `write_atomic` does, unless it is there already; True if it was not.

    Of several writers exactly one gets True. Where a file system knows no links, the last one wins instead.
    """
    with _written(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            os.replace(temporary, path)
        return True


@contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file beside `path` that holds `data`; gone afterwards."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
