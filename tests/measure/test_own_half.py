"""Own damage is measured on half of the samples, chosen by nothing that measuring could care about."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qprobe.measure.runner import own_half
from qprobe.records import Sample
from qprobe.samples.inputs import Batch


def batch_of(prompts: list[str], silent: frozenset[int] = frozenset()) -> Batch:
    samples = tuple(Sample(str(i), prompt) for i, prompt in enumerate(prompts))
    answers = tuple((0, 0 if i in silent else 1) for i in range(len(prompts)))
    return Batch(samples, {}, torch.zeros(len(prompts), 1, dtype=torch.uint8), answers)


@given(st.lists(st.text(max_size=4), min_size=1, max_size=9, unique=True), st.randoms())
def test_the_same_samples_are_taken_in_any_order(prompts: list[str], random: object) -> None:
    shuffled = list(prompts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    taken = {prompts[i] for i in own_half(batch_of(prompts))}
    assert taken == {shuffled[i] for i in own_half(batch_of(shuffled))}
    assert len(taken) == (len(prompts) + 1) // 2


def test_samples_without_an_answer_are_not_taken() -> None:
    assert own_half(batch_of(["a", "b", "c"], silent=frozenset((0, 2)))) == [1]


def test_kinds_that_take_turns_are_all_taken() -> None:
    # Kinds of samples often alternate in a batch; every second position would always be the same kinds.
    batches = [batch_of([f"{kind}{n}" for kind in "abcd"]) for n in range(40)]
    taken = [i for batch in batches for i in own_half(batch)]
    assert len(taken) == 80
    assert all(8 <= taken.count(kind) <= 32 for kind in range(4))
