"""Limits of time and memory for work that somebody else's text decides, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

MEMORY_BYTES = 2**30
INTEGER_BITS = 2**16  # of what a template computes; templates count messages
_FURTHEST = 100  # digits that a number is rounded to
_LONGEST = 2**20  # characters of a text that a filter searches
_SEARCHING = ("striptags", "title", "urlize", "wordcount", "wordwrap")  # filters that split texts by patterns


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """While open, Python code that takes longer is ended by a TimeoutError, in whichever thread it runs.

    What counts is that thread's processor time, since on a busy machine short work takes long by the clock;
    where the system does not tell it, the clock does. On Linux it cannot take more than `MEMORY_BYTES`
    either, in the main thread: what asks for them raises a MemoryError. A single call into a library that
    lasts long is ended once it returns.
    """
    thread, turn, is_over = threading.get_ident(), threading.Lock(), False
    clock = _clock_of(thread)
    last = clock() + seconds

    def timer_of(wait: float) -> threading.Timer:
        made = threading.Timer(wait, end)
        made.daemon = True
        return made

    def end() -> None:
        nonlocal timer
        with turn:
            if is_over:
                return
            if (left := last - clock()) <= 0:
                _raise_in(thread, TimeoutError)
            else:
                timer = timer_of(left)
                timer.start()

    timer = timer_of(seconds)
    with _limited_memory():  # undone last, where no TimeoutError can come any more
        try:
            timer.start()
            yield
        finally:
            with turn:
                is_over = True
            timer.cancel()


def _clock_of(thread: int) -> Callable[[], float]:
    """The processor time of a thread that lives, in seconds; the clock where the system does not tell it."""
    if not hasattr(time, "pthread_getcpuclockid"):  # Windows, macOS
        return time.monotonic
    return partial(time.clock_gettime, time.pthread_getcpuclockid(thread))


def _raise_in(thread: int, error: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Limits the process, so only while its main thread waits for the work: what other threads do beside it
    would find no memory, and limits that overlap could not be undone.
    """
    status = Path("/proc/self/statm")
    if threading.current_thread() is not threading.main_thread() or not status.exists():
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


@contextmanager
def bounded_arithmetic() -> Iterator[None]:
    """While open, sandboxes of Jinja are made in which no arithmetic is an endless call into C.

    A power of integers, a product of huge ones, a round to billions of digits and a sum of lists hold up all
    threads, so that `limited` cannot end them, also while a template is compiled. They raise an OverflowError
    instead, as patterns do that long texts are searched for, and sums are taken one by one.
    """
    with _turn:
        _open.append(_bind_arithmetic() if not _open else None)
    try:
        yield
    finally:
        with _turn:
            # Threads may leave in another order than they came in: the last one undoes what the first did.
            undo = _open.pop(0)
            if _open:
                _open[0] = undo
            elif undo is not None:
                undo()


_turn = threading.Lock()
_open: list[Callable[[], None] | None] = []  # one item per `bounded_arithmetic` that is open


def _bind_arithmetic() -> Callable[[], None]:
    """Change what Jinja makes sandboxes of; what is returned changes it back."""
    from jinja2.filters import FILTERS
    from jinja2.sandbox import SandboxedEnvironment as Sandbox

    table, intercepted = Sandbox.default_binop_table, Sandbox.intercepted_binops
    guarded = {name: _bounded(name, table[name]) for name in ("*", "/", "//", "%", "**")}
    filters: dict[str, Any] = {x: FILTERS[x] for x in ("round", "sum", *_SEARCHING)}
    Sandbox.default_binop_table = {**table, **guarded}
    Sandbox.intercepted_binops = intercepted | guarded.keys()
    FILTERS.update({x: _of_short_texts(x, FILTERS[x]) for x in _SEARCHING})
    FILTERS.update(round=_bounded_round(FILTERS["round"]), sum=_summed())

    def undo() -> None:
        Sandbox.default_binop_table, Sandbox.intercepted_binops = table, intercepted
        FILTERS.update(filters)

    return undo


def _bounded(name: str, operate: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def bounded(left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if name == "**" else left.bit_length() + right.bit_length()
            if bits > INTEGER_BITS:
                raise OverflowError("it computes with integers of thousands of digits")
        return operate(left, right)

    return bounded


def _bounded_round(rounded: Callable[..., Any]) -> Callable[..., Any]:
    def bounded(value: Any, precision: int = 0, method: str = "common") -> Any:
        if not -_FURTHEST <= precision <= _FURTHEST:
            raise OverflowError(f"it rounds to {precision} digits")
        return rounded(value, precision, method)

    return bounded


def _of_short_texts(name: str, search: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(search)  # also what Jinja notes on it
    def bounded(*given: Any, **named: Any) -> Any:
        if any(isinstance(x, str) and len(x) > _LONGEST for x in given):
            raise OverflowError(f"{name} reads more than {_LONGEST:,} characters")
        return search(*given, **named)

    return bounded


def _summed() -> Callable[..., Any]:
    from jinja2 import pass_environment
    from jinja2.filters import make_attrgetter

    @pass_environment
    def summed(environment: Any, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        total = start
        for value in values if attribute is None else map(make_attrgetter(environment, attribute), values):
            total = total + value
        return total

    return summed
