"""Work in a background thread is done in order, all of it, and its errors are not lost."""

from __future__ import annotations

import threading
import time

import pytest

from qprobe.system.background import in_background


def test_work_is_done_in_order_by_the_end_of_the_block():
    done: list[int] = []
    with in_background(2) as do:
        for number in range(20):
            do(lambda number=number: done.append(number))
    assert done == list(range(20))


def test_the_caller_goes_on_while_no_more_waits_than_may():
    go = threading.Event()
    with in_background(3) as do:
        for _ in range(3):
            do(lambda: go.wait(20) and None)  # would never end if giving waited
        assert not go.is_set()
        go.set()


def test_without_room_each_is_done_when_the_call_returns():
    done: list[int] = []
    with in_background(0) as do:
        do(lambda: done.append(1))
        assert done == [1]


def test_an_error_is_raised_and_nothing_after_it_is_done():
    done: list[int] = []

    def fail() -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), in_background(5) as do:
        do(fail)
        for _ in range(10):
            do(lambda: done.append(1))
    assert len(done) < 10


def test_what_waits_behind_an_error_is_not_done():
    done: list[int] = []

    def fail() -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), in_background(5) as do:
        do(fail)
        for _ in range(3):
            do(lambda: done.append(1))
        time.sleep(0.05)  # in which the thread would do them
    assert done == []


def test_an_error_of_the_caller_is_not_hidden():
    with pytest.raises(KeyError), in_background(5) as do:
        do(lambda: None)
        raise KeyError("own")
