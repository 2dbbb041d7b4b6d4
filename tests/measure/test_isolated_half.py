"""Isolated KL is measured on half of the samples, chosen by nothing that measuring could care about."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from qprobe.measure.runner import isolated_half
from qprobe.records import Sample, asked


def samples_of(prompts: list[str]) -> list[Sample]:
    return [Sample(prompt, asked(prompt), answer="yes") for prompt in prompts]


@given(st.lists(st.text(max_size=4), min_size=1, max_size=9, unique=True), st.integers())
def test_the_same_half_is_taken_in_any_order(prompts: list[str], seed: int) -> None:
    samples = samples_of(prompts)
    shuffled = Random(seed).sample(samples, len(samples))
    assert isolated_half(samples) == isolated_half(shuffled)
    assert len(isolated_half(samples)) == (len(prompts) + 1) // 2


def test_samples_without_an_answer_are_not_taken() -> None:
    silent = [Sample("a", asked("a"), ""), Sample("b", asked("b")), Sample("c", asked("c"), "yes")]
    assert isolated_half(silent) == {"c"}


def test_kinds_that_take_turns_are_all_taken() -> None:
    # Kinds of samples often alternate; every second one would always be of the same kinds.
    taken = isolated_half(samples_of([f"{kind}{n}" for n in range(40) for kind in "abcd"]))
    assert len(taken) == 80
    assert all(10 <= sum(name[0] == kind for name in taken) <= 30 for kind in "abcd")
