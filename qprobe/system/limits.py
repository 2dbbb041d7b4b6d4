"""Limits of time and memory for work that somebody else's text decides, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY_BYTES = 2**30


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """While open, Python code that takes longer is ended by a TimeoutError, in whichever thread it runs.

    On Linux it cannot take more than `MEMORY_BYTES` either: what asks for them raises a MemoryError. A single
    call into a library that lasts long is ended once it returns.
    """
    thread, turn, is_over = threading.get_ident(), threading.Lock(), False

    def end() -> None:
        with turn:
            if not is_over:
                _raise_in(thread, TimeoutError)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    try:
        with _limited_memory():
            timer.start()
            yield
    finally:
        with turn:
            is_over = True
        timer.cancel()


def _raise_in(thread: int, error: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


@contextmanager
def _limited_memory() -> Iterator[None]:
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(status.read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    is_lower = soft != resource.RLIM_INFINITY and soft < most
    resource.setrlimit(resource.RLIMIT_AS, (soft if is_lower else most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
