"""What calibration decides by itself, and the sentences that say so."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isnan, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qprobe.calibration.correction import _comparison
from qprobe.calibration.decide import TRIAL, TRIAL_LARGE, trial_inputs, tried_in_turn
from qprobe.calibration.experts.rounding import _error
from qprobe.calibration.gram import Gram
from qprobe.calibration.room import outputs_bytes
from qprobe.calibration.tuning import STEPS, Tuned, default_steps, tune_steps
from qprobe.calibration.walk import can_walk
from qprobe.formats.nf4 import Nf4
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


@pytest.mark.parametrize(
    ("tried", "told"),
    [
        (
            0.5012,
            "Tuned scales were no better on the calibration samples kept back (0.5012 per embedding "
            "at best, 0.5 before), so they are not used.",
        ),
        (inf, "Tuning scales came to no finite damage, so it is left out."),
    ],
)
def test_tuning_that_is_no_better_says_that_it_is_not_used(tried: float, told: str):
    found = Tuned({}, 0.5, 0.5, 0, tried, "per embedding")
    assert not found.is_better
    assert found.sentence == told


def test_tuning_that_is_better_says_by_how_much():
    found = Tuned({}, 0.25, 0.125, 40, 0.125, "nats per token")
    assert found.is_better and found.sentence == (
        "Scales were tuned for 40 steps: on calibration samples kept back from that the damage fell from "
        "0.25 to 0.125 nats per token."
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


@pytest.mark.parametrize(
    ("limit", "device", "walks"), [(None, CPU, True), (None, GPU, True), (1, GPU, True), (1, CPU, False)]
)
def test_blocks_are_walked_unless_what_they_put_out_counts_for_a_limit(limit: Any, device: Any, walks: bool):
    one = subject(device, SMALL)
    one.limit = limit
    assert can_walk(one) == walks


def test_the_gradients_matrices_take_memory_where_the_model_is_but_wait_on_the_host_of_a_limited_gpu():
    def of(limit: Any, device: Any) -> int:
        one = subject(device, SMALL)
        one.limit = limit
        return outputs_bytes(one, [64, 128])

    everything = of(None, CPU)
    assert everything == 4 * (64**2 + 128**2)
    assert of(None, GPU) == of(1, CPU) == everything and of(1, GPU) == 0


def test_the_error_of_experts_is_a_share_of_rounding_to_nearest_by_hand():
    torch.manual_seed(0)
    own, fmt = torch.randn(2, 64, 64), Nf4()
    nearest = fmt.pack(own).unpack()
    grams = {0: Gram(torch.eye(64), tokens=64)}
    for times in (0.0, 1.0, 2.0):  # so many times the error of rounding to nearest, so its square in energy
        read = own + times * (nearest - own)
        whole: Any = SimpleNamespace(packed=lambda read=read: SimpleNamespace(unpack=lambda: read))
        assert _error(own, whole, grams, fmt) == pytest.approx(times**2, rel=1e-4, abs=1e-9)
    assert isnan(_error(own, whole, {}, fmt))  # nothing is known where no expert read a token
