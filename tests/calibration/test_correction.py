"""Corrections of low rank of what 4-bit leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qprobe.calibration import correction
from qprobe.calibration.calibrate import Turns, calibrate_model, gathering_turns
from qprobe.calibration.correction import (
    FILE_NAME,
    MIX,
    best_correction,
    damage_with,
    keep_correction,
    largest_directions,
)
from qprobe.calibration.gptq import Metric, metric_of, output_error, shrunk
from qprobe.calibration.gram import gathered, shared_inputs
from qprobe.calibration.token_weights import token_weights
from qprobe.calibration.work import Work
from qprobe.formats.codes_file import sha256_of
from qprobe.measure.attribution import walking
from qprobe.runs.folder import RunFolder
from tests.calibration.test_calibrate import samples_of, subject_for, work_in
from tests.calibration.test_gptq import inputs

TinyFolder = Callable[[str], Path]


def left_by(error: torch.Tensor, metric: Metric, rank: int) -> float:
    left, right = best_correction(error, metric, rank)
    damped = metric.gram + metric.ridge * torch.eye(error.shape[1])
    return float(output_error((error - left @ right).T.contiguous(), damped).sum())


def test_the_error_left_is_that_of_the_smallest_singular_values_under_the_metric():
    # Eckart and Young: of E R with R R^T = G the squares of all singular values but the largest r are left.
    x = inputs(300, 40)
    metric = metric_of(x.T @ x)
    assert metric is not None
    error = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    damped = (metric.gram + metric.ridge * torch.eye(40)).double()
    values = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(damped)).square()
    for rank in (1, 5, 20):
        assert left_by(error, metric, rank) == pytest.approx(float(values[rank:].sum()), rel=1e-3)
    assert left_by(error, metric, 64) < 1e-5 * float(values.sum())


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_error_left_under_both_metrics_is_that_of_the_smallest_singular_values(rank: int):
    x, g = inputs(300, 40), inputs(60, 24, seed=5)
    metric, outputs = metric_of(x.T @ x), g.T @ g
    assert metric is not None
    error = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    of_inputs = (metric.gram + metric.ridge * torch.eye(40)).double()
    mean = outputs.diagonal().mean()
    of_outputs = (MIX * outputs / mean + (1 - MIX) * torch.eye(24)).double()

    def cost(of: torch.Tensor) -> float:
        return float(((of.double() @ of_inputs @ of.double().T) * of_outputs).sum())

    roots = torch.linalg.cholesky(of_outputs).T @ error.double() @ torch.linalg.cholesky(of_inputs)
    left, right = best_correction(error, metric, rank, outputs)
    assert (left.shape, right.shape) == ((24, rank), (rank, 40))
    least = cost(error - left @ right)
    assert least == pytest.approx(float(torch.linalg.svdvals(roots)[rank:].square().sum()), rel=1e-3)
    one_sided = torch.matmul(*best_correction(error, metric, rank))
    assert least < 0.99 * cost(error - one_sided)


@pytest.mark.parametrize("outputs", [torch.zeros(24, 24), torch.full((24, 24), torch.inf)])
def test_outputs_that_say_nothing_count_alike(outputs: torch.Tensor):
    x = inputs(300, 40)
    metric = metric_of(x.T @ x)
    assert metric is not None
    error = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        best_correction(error, metric, 3, outputs), best_correction(error, metric, 3), strict=True
    ):
        assert torch.equal(one, other)


def test_the_search_for_the_largest_directions_finds_them(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(120, 90, generator=generator) * torch.arange(1, 91).float().reciprocal()
    wanted = torch.linalg.svdvals(matrix)[:8]
    monkeypatch.setattr(correction, "EXACT_UP_TO", 0)
    u, s, vh = largest_directions(matrix, 8)
    torch.testing.assert_close(s, wanted, rtol=1e-4, atol=0)
    assert u.shape == (120, 8) and vh.shape == (8, 90)
    torch.testing.assert_close(u.T @ matrix @ vh.T, s.diag(), rtol=1e-3, atol=1e-4)


def test_small_matrices_are_decomposed_exactly():
    # Noise, whose singular values lie close together: a search of a few sweeps misses the first ones.
    matrix = torch.randn(90, 90, generator=torch.Generator().manual_seed(0))
    u, s, vh = largest_directions(matrix, 8)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix)[:8], rtol=1e-5, atol=0)
    torch.testing.assert_close(u * s, matrix @ vh.T, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def calibrated(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Work:
    subject = subject_for(tiny_folder("llama"))
    work = work_in(tmp_path_factory.mktemp("run"), subject, "llama")
    work = replace(work, samples=subject.groups(tuple(samples_of("llama", 16)), 8))
    calibrate_model(work)
    return work


@pytest.fixture
def enough(calibrated: Work, tmp_path: Path) -> Work:
    """Calibrated weights of the tiny Llama, on samples of which two are kept back."""
    return replace(calibrated, run=RunFolder(copytree(calibrated.run.path, tmp_path / "run")))


@pytest.mark.slow
def test_a_correction_is_kept_where_it_is_better_on_samples_it_was_not_fitted_to(
    enough: Work, monkeypatch: pytest.MonkeyPatch
):
    training, kept_back = enough.split
    keep_correction(enough, 64)
    noted, path = enough.run.notes.get("correction"), enough.run.path / FILE_NAME
    assert noted.sha256 == sha256_of(path) and "is kept, for adapters to start at" in noted.notes[0]
    # As if those that are kept back had never been there.
    alone = replace(enough, samples=tuple(training))
    monkeypatch.setattr(Work, "split", property(lambda self: (list(self.samples), [])))
    path.unlink()
    keep_correction(alone, 64)
    assert sha256_of(path) == noted.sha256 and kept_back


@pytest.mark.slow
def test_a_correction_of_a_run_counts_outputs_by_how_much_the_answers_depend_on_them(
    enough: Work, monkeypatch: pytest.MonkeyPatch
):
    turns: list[Turns] = []

    def noting(*given: Any, **more: Any) -> Turns:
        turns.append(gathering_turns(*given, **more))
        return turns[-1]

    monkeypatch.setattr(correction, "gathering_turns", noting)
    keep_correction(enough, 4)
    (outputs,) = (x.outputs for x in turns)
    assert outputs
    kept, subject = load_file(enough.run.path / FILE_NAME), enough.subject
    fitting = replace(enough, samples=tuple(enough.split[0]))
    with walking(subject.path):
        names = shared_inputs(subject, fitting.batches)
        weights = token_weights(subject, names, fitting.widened)
        grams = gathered(subject, names, fitting.widened, weights=weights.of).grams
    for one in names:
        metric = metric_of(shrunk(grams[one.leader].total, grams[one.leader].tokens))
        assert metric is not None
        for name in one.names:
            error = subject.dequantized.own(name).float() - subject.dequantized.weight(name).float()
            left, right = best_correction(error, metric, 4, weights.outputs[name])
            found = kept[f"{name}.left"].float() @ kept[f"{name}.right"].float()
            torch.testing.assert_close(found, left @ right, rtol=0.02, atol=0.02 * float(error.abs().max()))


@pytest.mark.slow
def test_a_correction_that_does_harm_on_samples_kept_back_is_not_kept_and_said(
    enough: Work, monkeypatch: pytest.MonkeyPatch
):
    def wrong_way(error: torch.Tensor, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = best_correction(error, *more)
        return -2 * left, right

    monkeypatch.setattr(correction, "best_correction", wrong_way)
    keep_correction(enough, 16)
    noted = enough.run.notes.get("correction")
    assert noted.sha256 is None and not (enough.run.path / FILE_NAME).exists()
    assert "no better than none, so it is not kept" in noted.notes[0]
    assert noted.notes[0] in enough.run.notes.sentences
    monkeypatch.setattr(correction, "best_correction", lambda *_: pytest.fail("it is decided already"))
    keep_correction(enough, 16)


@pytest.mark.slow
def test_damage_with_the_whole_error_added_is_that_of_16bit(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    batches = [subject.encode(tuple(samples_of("llama"))).in_dtype(subject.path.dtype)]
    whole = {}
    for name in subject.quantized:
        error = subject.dequantized.own(name).float() - subject.dequantized.weight(name).float()
        whole |= {f"{name}.left": error, f"{name}.right": torch.eye(error.shape[1])}
    assert damage_with(subject, whole, batches) < 1e-4 * damage_with(subject, {}, batches)


@pytest.mark.slow
def test_corrections_of_a_run_lessen_the_error_of_its_calibrated_weights(
    tiny_folder: TinyFolder, tmp_path: Path
):
    subject = subject_for(tiny_folder("llama"))
    work = work_in(tmp_path, subject, "llama")
    calibrate_model(work)
    keep_correction(work, 16)
    kept = load_file(tmp_path / FILE_NAME)
    batches = list(work.widened)
    names = shared_inputs(subject, batches)
    assert set(kept) == {f"{n}.{side}" for one in names for n in one.names for side in ("left", "right")}
    with walking(subject.path):
        grams = gathered(subject, names, batches).grams
    for one in names:
        for name in one.names:
            error = subject.dequantized.own(name).float() - subject.dequantized.weight(name).float()
            fix = kept[f"{name}.left"].float() @ kept[f"{name}.right"].float()
            gram = grams[one.leader].total.float()
            before, after = (float(output_error(e.T.contiguous(), gram).sum()) for e in (error, error - fix))
            assert after < 0.8 * before, name
