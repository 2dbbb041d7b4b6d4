"""Work that a thread does while the caller goes on, such as writing files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

Work = Callable[[], None]


@contextmanager
def in_background(waiting: int) -> Iterator[Callable[[Work], None]]:
    """A function that gives work to one thread, which does it in the order given.

    waiting: how much of it may be unfinished while the caller goes on, beyond which giving waits; 0: the
    caller waits for each. All of it is finished at the end of the block. What work raises is raised by a
    later call or at the end; nothing after it is done.
    """
    unfinished: deque[Future[None]] = deque()
    is_failed = False

    def unless_failed(work: Work) -> None:
        nonlocal is_failed
        if is_failed:
            return
        try:
            work()
        except BaseException:
            is_failed = True
            raise

    with ThreadPoolExecutor(1) as thread:

        def settle(most: int) -> None:
            while len(unfinished) > most:
                unfinished.popleft().result()

        def give(work: Work) -> None:
            unfinished.append(thread.submit(unless_failed, work))
            settle(waiting)

        try:
            yield give
            settle(0)
        finally:
            for one in unfinished:
                one.cancel()
