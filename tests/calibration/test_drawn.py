"""Codes that are fitted to texts of the model's own as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from qprobe.calibration.calibrate import gathering_turns
from qprobe.calibration.gram import gathered, shared_inputs
from qprobe.calibration.token_weights import token_weights
from qprobe.calibration.tuning import Given
from qprobe.calibration.work import Work
from qprobe.inputs.batch import PAD, Batch
from qprobe.measure.attribution import walking
from tests.calibration.test_calibrate import samples_of, subject_for, work_in

TinyFolder = Callable[[str], Path]
TEXTS = tuple(tuple(range(i, i + 12)) for i in range(10, 90, 5))


def work_of(folder: Path, tiny_folder: TinyFolder, count: int = 16, name: str = "llama") -> Work:
    work = work_in(folder, subject_for(tiny_folder(name)), name)
    groups = work.subject.groups(tuple(samples_of(name, count)), 2)
    return replace(work, samples=groups, draw=lambda: TEXTS)


def split_in_four(batch: Batch) -> list[Batch]:
    """The same batch four times, each of a quarter of its weight."""
    return [replace(batch, weight=0.25)] * 4


def test_four_batches_of_a_quarter_weight_count_as_one(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    first, second = (subject.encode((s,)).in_dtype(subject.path.dtype) for s in samples_of("llama", 2))
    inputs = shared_inputs(subject, [first])
    ways = [first, second], [first, *split_in_four(second)]
    with walking(subject.path):
        whole, parts = (token_weights(subject, inputs, batches) for batches in ways)
        for counts in (None, (whole, parts)):
            found = [
                gathered(subject, inputs, batches, weights=None if counts is None else counts[i].of).grams
                for i, batches in enumerate(ways)
            ]
            for leader, gram in found[0].items():
                torch.testing.assert_close(found[1][leader].total, gram.total, rtol=1e-5, atol=1e-6)
                assert found[1][leader].tokens == pytest.approx(gram.tokens)
    assert parts.means == pytest.approx(whole.means)
    for name, matrix in whole.outputs.items():
        torch.testing.assert_close(parts.outputs[name], matrix, rtol=1e-4, atol=1e-6 * float(matrix.max()))


def test_texts_weigh_no_token_of_what_reads_images_alone(tiny_folder: TinyFolder, tmp_path: Path):
    # As in a process whose share of the linears is the vision tower, or where these are left after a kill.
    work = work_of(tmp_path, tiny_folder, 2, "mllama")
    inputs = shared_inputs(work.subject, work.batches)
    seeing = [one for one in inputs if "vision" in one.leader]
    assert 0 < len(seeing) < len(inputs)
    with walking(work.subject.path):
        own, both = (
            token_weights(work.subject, seeing, (b.in_dtype(work.subject.path.dtype) for b in batches))
            for batches in (islice(work.batches, 1), islice(work.batches, 2))
        )
    assert both.means == own.means and all(mean > 0 for mean in own.means.values())
    assert all([len(x) for x in found] == [len(found[0]), 0] for found in both.raw.values())


def test_all_texts_together_count_as_much_as_the_samples_and_no_token_more_than_one_of_theirs(
    tiny_folder: TinyFolder, tmp_path: Path
):
    many, few = (work_of(tmp_path / str(n), tiny_folder, n) for n in (2, 16))
    for work, is_less in ((many, True), (few, False)):
        tokens = sum(int((work.subject.encode(group).kinds != PAD).sum()) for group in work.samples)
        weight = work.drawn[0].weight
        assert (weight < 1) == is_less and all(batch.weight == weight for batch in work.drawn)
        if is_less:
            assert weight * sum(map(len, TEXTS)) == pytest.approx(tokens)
        else:
            assert tokens > sum(map(len, TEXTS))


def test_texts_come_after_the_samples_for_fitting_and_before_those_kept_back(
    tiny_folder: TinyFolder, tmp_path: Path
):
    work = work_of(tmp_path, tiny_folder)
    ids = [[s.id for s in batch.samples] for batch in work.batches]
    training, kept_back = ([[s.id for s in group] for group in part] for part in work.split)
    drawn = [["drawn"] * 8] * 2  # four for each sample of a batch
    assert ids == [*training, *drawn, *kept_back]
    assert (work.fitting, work.count) == (len(training) + 2, len(ids))


def test_steps_of_tuning_take_samples_and_texts_in_turn(tiny_folder: TinyFolder, tmp_path: Path):
    samples = list(work_of(tmp_path, tiny_folder).batches)[:3]
    given = Given(samples, (), [replace(batch) for batch in samples])
    every = [*given.training, *given.drawn]
    taken = [next(i for i, b in enumerate(every) if b is x) for x in islice(given.in_turn(), 12)]
    assert all(sorted(taken[i : i + 6 : 2]) == [0, 1, 2] for i in (0, 6))
    assert all(sorted(taken[i : i + 6 : 2]) == [3, 4, 5] for i in (1, 7))
    alone = [
        next(i for i, b in enumerate(every) if b is x) for x in islice(replace(given, drawn=()).in_turn(), 6)
    ]
    assert sorted(alone[:3]) == sorted(alone[3:]) == [0, 1, 2]


def test_no_token_of_a_text_takes_more_steps_than_one_of_a_sample(tiny_folder: TinyFolder, tmp_path: Path):
    # One batch of texts beside four of samples, all of as many tokens: a fifth of the steps, not half.
    sample = next(work_of(tmp_path, tiny_folder).batches)
    given = Given([sample] * 4, (), [replace(sample)])
    assert [x is sample for x in islice(given.in_turn(), 10)] == [*[True] * 4, False] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mllama"])
def test_matrices_are_of_samples_and_texts(name: str, tiny_folder: TinyFolder, tmp_path: Path):
    # What reads images alone is as without texts: its matrices hold nothing of them.
    own, both = (work_of(tmp_path / x, tiny_folder, 4, name) for x in ("own", "both"))
    own = replace(own, draw=tuple)
    subject = both.subject
    inputs = shared_inputs(subject, own.batches)
    found = []
    for work in (own, both):
        turns = gathering_turns(work, inputs, inputs)
        found.append({n: x.total for g in turns.gathered(lambda: None) for n, x in g.grams.items()})
    changed = {n for n, total in found[0].items() if not torch.equal(total, found[1][n])}
    # Without an image Mllama leaves out its cross-attention layer, number 1, as a whole.
    sees = {n for n in found[0] if "language_model" not in n and name == "mllama"}
    left_out = {n for n in found[0] if ".layers.1." in n and name == "mllama"}
    assert changed and changed == found[0].keys() - sees - left_out
