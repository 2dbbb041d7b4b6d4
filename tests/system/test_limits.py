"""Limits of time and memory for what somebody else's text decides."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from qprobe.data import rendering
from qprobe.data.reasons import Refused
from qprobe.records import Turn
from qprobe.system.limits import bounded_arithmetic, limited

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
    assert time.monotonic() - start < 60


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="the clock counts here")
def test_time_in_which_other_work_has_the_processor_does_not_count():
    with limited(0.05):
        time.sleep(0.2)
        for _ in range(1000):  # an error that is due is raised between two steps
            pass
    with pytest.raises(TimeoutError), limited(0.05):
        time.sleep(0.2)
        endless()


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
    thread.join(60)
    assert len(raised) == 1


def test_memory_is_limited_while_it_lasts():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), limited(5):
        bytes(2**31)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_thread_beside_leaves_the_memory_of_the_process_alone():
    before = resource.getrlimit(resource.RLIMIT_AS)
    entered, first_left, found = threading.Event(), threading.Event(), []

    def second() -> None:
        with limited(60):
            entered.set()
            first_left.wait(60)
            found.append(resource.getrlimit(resource.RLIMIT_AS))

    thread = threading.Thread(target=second)
    with limited(60):
        thread.start()
        assert entered.wait(60)
        assert resource.getrlimit(resource.RLIMIT_AS) != before
    first_left.set()
    thread.join(60)
    assert [*found, resource.getrlimit(resource.RLIMIT_AS)] == [before, before]


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


def rendered(template: str) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    with bounded_arithmetic():
        return ImmutableSandboxedEnvironment().from_string(template).render(rows=[{"n": 1}, {"n": 2}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9 ** (9 ** 9) }}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ ('f' * 100000000)|int(base=16) % ('e' * 10000000)|int(base=16) }}",
        "{{ ('f' * 100000000)|int(base=16) // ('e' * 10000000)|int(base=16) }}",
        "{{ 1|round(-1000000000) }}",
        "{{ ('x ' * 1000000)|wordwrap(1) }}",
        "{{ ('x ' * 1000000)|urlize }}",
    ],
)
def test_arithmetic_that_no_limit_of_time_ends_is_refused_at_once(template: str):
    with pytest.raises(OverflowError, match=r"thousands of digits|rounds to|1,048,576 characters"):
        rendered(template)


def test_a_sum_of_lists_is_ended_in_time():
    with pytest.raises(TimeoutError), limited(0.1):
        rendered("{{ ([[1] * 100] * 99999)|sum(start=[]) }}")


def test_arithmetic_of_templates_stays_as_it_is():
    template = (
        "{{ 7 % 2 }} {{ 2 ** 10 }} {{ 7 // 2 }} {{ 1 / 2 }} {{ 'a' * 3 }} {{ '%03d' % 3 }} {{ 2 ** -1 }} "
        "{{ 2.345|round(1) }} {{ 17|round(-1) }} {{ [1, 2]|sum }} {{ rows|sum('n', 10) }} {{ [1] * 2 }} "
        "{{ 'a b'|wordwrap(1)|length }} {{ 'www.x.org'|urlize|length > 9 }} {{ 'a b'|wordcount }}"
    )
    assert rendered(template) == "1 1024 3 0.5 aaa 003 0.5 2.3 20 3 13 [1, 1] 3 True 2"


def test_other_sandboxes_compute_as_before():
    from jinja2.sandbox import SandboxedEnvironment

    rendered("{{ 1 }}")
    assert SandboxedEnvironment.intercepted_binops == frozenset()
    assert SandboxedEnvironment().from_string("{{ (2 ** 70000) % 7 }}").render() == "2"  # 2^(70000 mod 3)


def test_what_threads_share_is_bounded_until_the_last_one_is_done():
    from jinja2.sandbox import SandboxedEnvironment

    first, second = bounded_arithmetic(), bounded_arithmetic()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert SandboxedEnvironment.intercepted_binops
    second.__exit__(None, None, None)
    assert SandboxedEnvironment.intercepted_binops == frozenset()
