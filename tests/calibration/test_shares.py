"""Processes that share calibration."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import inf, isnan
from threading import Barrier
from threading import get_ident as current

import pytest
import torch
from torch import nn

from qprobe.calibration import calibrate as calibration
from qprobe.calibration.calibrate import calibrate_model
from qprobe.calibration.decide import tried_in_turn
from qprobe.calibration.gram import SharedInput
from qprobe.calibration.room import shares
from qprobe.formats.codes_file import FILE_NAME, sha256_of
from qprobe.runs.folder import RunFolder
from qprobe.system.processes import Shard
from tests.calibration.test_calibrate import subject_for, weights, work_in


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.usefixtures("quick_rounding")
def test_processes_that_share_a_folder_leave_the_file_of_one(world, tiny_folder, tmp_path, monkeypatch):
    alone = work_in(tmp_path / "alone", subject_for(tiny_folder("llama")), "llama")
    calibrate_model(alone)
    finish, done = calibration._finish, []
    monkeypatch.setattr(calibration, "_finish", lambda *a: (done.append((current(), a[-1])), finish(*a)))
    works = [work_in(tmp_path / "shared", subject_for(tiny_folder("llama")), "llama") for _ in range(world)]
    with ThreadPoolExecutor(world) as pool:
        ended = [pool.submit(calibrate_model, work, Shard(rank, world)) for rank, work in enumerate(works)]
        for one in ended:
            one.result()
    # Each unit was done once, and several had some; what all hold is what is in the file.
    assert sorted(unit for _, unit in done) == list(range(len(done)))
    assert len({thread for thread, _ in done}) > 1
    assert sha256_of(works[0].run.path / FILE_NAME) == sha256_of(alone.run.path / FILE_NAME)
    first, *others = (weights(work.subject) for work in works)
    assert all(torch.equal(first[name], weight) for other in others for name, weight in other.items())
    assert {work.run.codes for work in works} == {alone.run.codes}


def test_each_of_two_trials_is_run_by_one_process_and_known_to_both(tmp_path):
    ran, both = [], Barrier(2)

    def trial(name: str, damage: float) -> float:
        both.wait(30)  # so that the two are at work at once
        ran.append(name)
        return damage

    plain, weighted = partial(trial, "plain", 0.25), partial(trial, "weighted", inf)
    trials = {"tokens-plain": plain, "tokens-weighted": weighted}
    (tmp_path / "notes").mkdir()

    def process(rank: int) -> dict[str, float]:
        return tried_in_turn(RunFolder(tmp_path), Shard(rank, 2), trials)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(process, range(2)))
    assert sorted(ran) == ["plain", "weighted"]
    assert [x["tokens-plain"] for x in found] == [0.25, 0.25]
    assert all(isnan(x["tokens-weighted"]) for x in found)  # not finite, which is all that is noted


def test_shares_follow_one_another_and_take_about_as_long(tiny_folder):
    subject = subject_for(tiny_folder("llama"))
    # Costs 2 x 8^2 = 128, 1 x 16^2 = 256, 64 and 448: half of 896 is reached after the third.
    shapes = ((8, 2), (16, 1), (8, 1), (8, 7))
    modules = {str(i): nn.Linear(*shape, device="meta") for i, shape in enumerate(shapes)}
    inputs = [SharedInput((name,), module.in_features) for name, module in modules.items()]
    spread = replace(subject, modules=modules)
    assert shares(spread, inputs, 2) == [range(0, 3), range(3, 4)]
    assert shares(spread, inputs, 1) == [range(0, 4)]
    assert [x for part in shares(spread, inputs, 3) for x in part] == [0, 1, 2, 3]
    assert shares(spread, [], 2) == [range(0, 0)] * 2
