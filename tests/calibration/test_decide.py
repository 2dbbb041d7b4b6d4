"""Whether tokens are weighed is decided on samples kept back."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe.calibration import calibrate as calibration
from qprobe.calibration import decide
from qprobe.calibration.calibrate import calibrate_model, calibrate_units
from qprobe.calibration.codes import Rounded
from qprobe.calibration.gram import SharedInput, shared_inputs
from qprobe.calibration.token_weights import token_weights
from qprobe.calibration.work import Work
from qprobe.formats.codes_file import FILE_NAME, sha256_of
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject
from qprobe.runs.folder import RunFolder
from qprobe.runs.notes import TokensCount
from tests import reference, tiny
from tests.calibration.test_calibrate import subject_for, work_in

TinyFolder = Callable[[str], Path]


def work_of(folder: Path, subject: Subject, count: int) -> Work:
    work = work_in(folder, subject, "llama")
    given = tiny.questions("llama", count)
    samples = tuple(replace(s, answer="the red bar" if i % 2 else "no") for i, s in enumerate(given))
    return replace(work, samples=work.subject.groups(samples, 2))


def test_weights_stay_unless_they_cost_more():
    worse, same, better = (TokensCount.of(plain=0.2, weighted=w, unit="per score") for w in (0.3, 0.2, 0.1))
    assert (worse.is_weighted, same.is_weighted, better.is_weighted) == (False, True, True)
    assert "cost 0.3 per score with tokens weighed and 0.2 where each counts once" in worse.notes[0]
    for none in (float("inf"), float("nan")):
        assert not TokensCount.of(plain=0.2, weighted=none, unit="per score").is_weighted
        assert TokensCount.of(plain=none, weighted=0.2, unit="per score").is_weighted


@pytest.mark.parametrize("size", [2, 3, 32])
def test_every_eighth_sample_is_kept_back_however_they_are_batched(
    size: int, tiny_folder: TinyFolder, tmp_path: Path
):
    work = work_of(tmp_path, subject_for(tiny_folder("llama")), 32)
    samples = [s for group in work.samples for s in group]
    work = replace(work, samples=work.subject.groups(tuple(samples), size))
    training, kept_back = ([s.id for group in part for s in group] for part in work.split)
    assert kept_back == [s.id for s in samples[7::8]]
    assert sorted([*training, *kept_back]) == sorted(s.id for s in samples)
    assert max(map(len, chain(*work.split))) <= size


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_layers_are_fitted_to_most_samples_and_compared_on_the_others(
    tiny_folder: TinyFolder, tmp_path: Path
):
    # 28 of 32 samples in 14 batches; no matrix may hold the last two, and only they are compared.
    subject = subject_for(tiny_folder("llama"))
    work = work_of(tmp_path, subject, 32)
    training, kept_back = work.split
    assert (len(training), len(kept_back)) == (14, 2)
    inputs = shared_inputs(subject, work.batches)
    asked: set[int] = set()

    def weights(leader: str, batch: int) -> torch.Tensor | None:
        asked.add(batch)
        return None

    found = decide.decided(subject, inputs, lambda: work.widened, 14, weights, work.format, 2**30)
    assert asked == set(range(14))
    # Without weights both ways are the same.
    assert found.plain == found.weighted and found.plain is not None and found.plain > 0
    # Of what is kept back alone: the matrices are of the same samples, so the damage is another one.
    again = [*training, kept_back[0]]
    batches = [subject.encode(group).in_dtype(subject.path.dtype) for group in again]
    other = decide.decided(subject, inputs, lambda: batches, 14, weights, work.format, 2**30)
    assert other.plain is not None and other.plain > 0 and other.plain != found.plain


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_what_is_decided_about_has_not_seen_the_gradients_of_samples_kept_back(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    subject = subject_for(tiny_folder("llama"))
    work = work_of(tmp_path, subject, 16)
    training, kept_back = (
        [subject.encode(group).in_dtype(subject.path.dtype) for group in part] for part in work.split
    )
    inputs = shared_inputs(subject, work.batches)
    with walking(subject.path):
        some, every = (token_weights(subject, inputs, x) for x in (training, [*training, *kept_back]))
    compared: list[dict[str, torch.Tensor]] = []

    def decided(*given: Any) -> TokensCount:
        weights, outputs = given[4], given[7]
        assert all(torch.equal(weights(x.leader, 0), some.of(x.leader, 0)) for x in inputs)
        compared.append({name: matrix.clone() for name, matrix in outputs.items()})
        return TokensCount(True, 0.2, 0.1, ())

    monkeypatch.setattr(calibration, "decided", decided)
    turns = calibration.gathering_turns(work, inputs, inputs)
    assert turns.outputs is not None and compared[0].keys() == turns.outputs.keys() == some.outputs.keys()
    for name, matrix in turns.outputs.items():
        assert torch.equal(compared[0][name], some.outputs[name]), name
        assert torch.equal(matrix, every.outputs[name]) and not torch.equal(matrix, some.outputs[name]), name


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_layers_that_calibration_leaves_out_are_compared_as_they_will_be_stored(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Were they compared in 16-bit, the way that leaves more of them out would seem to do less damage.
    work = work_of(tmp_path, subject_for(tiny_folder("llama")), 16)
    subject = work.subject
    inputs = shared_inputs(subject, work.batches)

    def none(_subject: object, group: list[SharedInput], *_: object) -> list[dict[str, Rounded]]:
        return [{name: Rounded(None, why="left out") for name in one.names} for one in group]

    monkeypatch.setattr(decide, "rounded_layers", none)
    training, kept_back = work.split
    found = decide.decided(
        subject, inputs, lambda: work.widened, len(training), lambda *_: None, work.format, 2**30
    )
    names = frozenset(name for one in decide.trial_inputs(subject, inputs) for name in one.names)
    own, swapped = deepcopy(subject.model).float(), deepcopy(subject.model).float()
    for name in names:
        swapped.get_submodule(name).weight.data = subject.dequantized.weight(name).float()
    kl, tokens = 0.0, 0
    for batch in map(subject.encode, kept_back):
        with torch.no_grad():
            p, q = (one(**batch.inputs).logits for one in (own, swapped))
        for row, (start, end) in enumerate(batch.answers):
            kl += reference.kl_nats(p[row, start - 1 : end - 1], q[row, start - 1 : end - 1])
            tokens += end - start
    assert found.plain == pytest.approx(kl / tokens, rel=1e-3) and kl > 0


@pytest.mark.slow
def test_too_few_samples_to_decide_are_noted_with_their_number(tiny_folder: TinyFolder, tmp_path: Path):
    work = work_of(tmp_path, subject_for(tiny_folder("llama")), 6)
    assert work.split == (work.samples, [])
    inputs = shared_inputs(work.subject, work.batches)
    calibrate_units(work, inputs, [0])
    noted = RunFolder(work.run.path).notes.get("tokens")
    assert (noted.is_weighted, noted.plain, noted.weighted) == (True, None, None)
    assert "comparing takes 16 calibration samples, and there are 6." in noted.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.usefixtures("quick_rounding")
def test_the_decision_is_noted_once_and_decides_the_codes(
    is_weighted: bool, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    subject = subject_for(tiny_folder("llama"))
    work = work_of(tmp_path / "decided", subject, 16)
    decisions = []

    def decided(*_: object) -> TokensCount:
        decisions.append(1)
        return TokensCount(is_weighted, 0.1, 0.2, ("told",))

    monkeypatch.setattr(calibration, "decided", decided)
    inputs = shared_inputs(subject, work.batches)
    calibrate_units(work, inputs, range(2))
    calibrate_model(work)
    assert len(decisions) == 1
    noted: TokensCount | None = RunFolder(work.run.path).notes.get("tokens")
    assert (
        noted is not None
        and noted == TokensCount(is_weighted, 0.1, 0.2, ("told",))
        and "told" in work.run.notes.sentences
    )
    if not is_weighted:
        monkeypatch.setattr(calibration, "TokenWeighing", lambda *_: pytest.fail("weights without use"))
    again = work_of(tmp_path / "again", subject, 16)
    again.run.notes.put("tokens", noted)
    calibrate_model(again)
    hashes = [sha256_of(one.run.path / FILE_NAME) for one in (work, again)]
    assert hashes[0] == hashes[1]
    other = work_of(tmp_path / "other", subject, 16)
    monkeypatch.undo()
    other.run.notes.put("tokens", replace(noted, is_weighted=not is_weighted))
    calibrate_model(other)
    assert sha256_of(other.run.path / FILE_NAME) != hashes[0]
