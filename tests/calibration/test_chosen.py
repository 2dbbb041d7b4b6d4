"""What calibration decides by itself, and the sentences that say so."""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qprobe.calibration.correction import _comparison
from qprobe.calibration.decide import TRIAL, TRIAL_LARGE, trial_inputs, tried_in_turn
from qprobe.calibration.tuning import STEPS, Tuned, default_steps, tune_steps
from qprobe.runs.folder import RunFolder
from qprobe.runs.notes import Trial
from qprobe.system.processes import Shard
from tests.runs.runs import make_run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL, LARGE = torch.float32, torch.bfloat16


def subject(device: torch.device, dtype: torch.dtype) -> Any:
    return SimpleNamespace(reference=SimpleNamespace(device=device), path=SimpleNamespace(dtype=dtype))


def test_scales_are_tuned_by_default_on_a_gpu_alone_and_less_for_large_models():
    assert default_steps(CPU, SMALL) == default_steps(CPU, LARGE) == 0
    assert (default_steps(GPU, SMALL), default_steps(GPU, LARGE)) == (STEPS["small"], STEPS["large"])
    assert STEPS["small"] > STEPS["large"] > 0


def test_steps_that_are_asked_for_are_taken_also_none():
    assert tune_steps(subject(GPU, SMALL), None) == STEPS["small"]
    assert [tune_steps(subject(GPU, SMALL), x) for x in (0, 7)] == [0, 7]
    assert tune_steps(subject(CPU, SMALL), 7) == 7


@pytest.mark.parametrize("after", [0.5, 0.50001, nan])
def test_tuning_that_is_no_better_says_that_it_is_not_used(after: float):
    found = Tuned({}, 0.5, after, 40)
    assert not found.is_better
    assert found.sentence == "Tuned scales were no better on the samples kept back, so they are not used."


def test_tuning_that_is_better_says_by_how_much():
    found = Tuned({}, 0.25, 0.125, 40)
    assert found.is_better and found.sentence == (
        "Scales were tuned for 40 steps: on calibration samples kept back from that the damage fell from "
        "0.25 to 0.125."
    )


def test_a_correction_is_kept_only_where_it_costs_less():
    assert _comparison(0.5, 0.25, "nats").startswith("A correction of the 4-bit weights is kept")
    assert "4-bit costs 0.5 nats without it and 0.25 with it." in _comparison(0.5, 0.25, "nats")
    for after in (0.5, 0.75, nan):
        assert "no better than none, so it is not kept" in _comparison(0.5, after, "nats")


@pytest.mark.parametrize(("dtype", "every"), [(SMALL, TRIAL), (LARGE, TRIAL_LARGE)])
def test_the_decision_looks_at_inputs_from_all_over_the_model(dtype: torch.dtype, every: int):
    inputs: list[Any] = list(range(3 * every))
    assert trial_inputs(subject(CPU, dtype), inputs) == [every // 2 + i * every for i in range(3)]
    assert trial_inputs(subject(CPU, dtype), inputs[: every // 2 + 1]) == [every // 2]
    assert trial_inputs(subject(CPU, dtype), inputs[: every // 2]) == inputs[: every // 2]  # all of too few


def noting(asked: list[str], name: str, damage: float) -> Callable[[], float]:
    def trial() -> float:
        asked.append(name)
        return damage

    return trial


def test_trials_are_made_once_by_whichever_process_comes_first(tmp_path: Path):
    folder, asked = make_run(tmp_path / "run"), []
    trials = {"tokens-plain": noting(asked, "plain", 0.5), "tokens-weighted": noting(asked, "weighted", nan)}
    found = tried_in_turn(RunFolder(folder), Shard(1, 2), trials)
    assert asked == ["weighted", "plain"]  # each process begins with another one
    assert found["tokens-plain"] == 0.5 and found["tokens-weighted"] != found["tokens-weighted"]
    again = tried_in_turn(RunFolder(folder), Shard(0, 2), trials)
    assert asked == ["weighted", "plain"] and again["tokens-plain"] == 0.5
    assert RunFolder(folder).notes.get("tokens-weighted") == Trial.of(nan)
