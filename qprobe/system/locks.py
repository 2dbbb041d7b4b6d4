"""Locks of files between processes, which the system lets go of when a process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
from typing import IO

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # of a file system that has none


def try_lock(file: IO[bytes] | int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Whether `file`, open, is locked now and not held by another process; None where locks are unknown.

    kind: fcntl.LOCK_EX or LOCK_SH. Over NFS a shared lock wants a file that can be read, an exclusive one a
    file that can be written. Raises OSError for anything else that is in the way.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True
