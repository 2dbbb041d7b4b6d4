"""Limits of time and memory for what somebody else's text decides."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from qprobe.data import rendering
from qprobe.data.reasons import Refused
from qprobe.records import Turn
from qprobe.system.limits import limited

NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def endless() -> None:
    while True:
        pass


def test_what_takes_too_long_is_ended_and_what_does_not_is_left_alone():
    start = time.monotonic()
    with pytest.raises(TimeoutError), limited(0.05):
        endless()
    with limited(0.05):
        pass
    time.sleep(0.1)
    assert time.monotonic() - start < 5


def test_threads_are_limited_too():
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with limited(0.05):
                endless()
        except TimeoutError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(5)
    assert len(raised) == 1


def test_memory_is_limited_while_it_lasts():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), limited(5):
        bytes(2**31)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    ("template", "said"), [(NESTED, r"more than 0\.1 s"), ("{{ 'a' * 3000000000 }}", "more than 1,024 MiB")]
)
def test_a_chat_template_that_takes_too_much_is_refused_once(
    monkeypatch: pytest.MonkeyPatch, template: str, said: str
):
    from transformers.utils.chat_template_utils import render_jinja_template

    calls: list[int] = []

    class Processor:
        def apply_chat_template(self, messages: object, **_: object) -> str:
            calls.append(1)
            return render_jinja_template([messages], chat_template=template)[0][0]  # pyright: ignore

    monkeypatch.setattr(rendering, "SECONDS", 0.1)
    one = rendering.Template(Processor())
    for _ in range(3):
        with pytest.raises(Refused, match=said):
            one.prompt((Turn("user", ("hello",)),))
    assert len(calls) == 1
