"""Two processes that train one adapter learn what one process learns, and either goes on for the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qprobe.errors import MachineError, RunError
from qprobe.manifest.write import write_manifest
from qprobe.system.devices import parse_device
from qprobe.training.finetune import finetune
from qprobe.training.result import Finetuned
from qprobe.training.together import _own_number, together
from tests import tiny
from tests.checkpoint.manifests import every_third, manifest_for
from tests.training.second import environment

pytestmark = pytest.mark.slow

LINES, BATCHES = 4, 2  # of a step
TOLERANCE = 1e-5


def stop(stage: str, done: int, _total: int) -> None:
    """A `Progress` that ends the run in step 3, after the checkpoint of step 2."""
    if stage == "train" and done == 3:
        raise KeyboardInterrupt


class Trainings:
    """Runs of one training. `alone`: in one process; `shared`: this one and a second one, begun with it."""

    def __init__(self, work: Path, options: dict[str, Any]) -> None:
        self.work, self.options = work, options
        self.ports = iter(free_ports(4))
        self.jobs: list[tuple[int, dict[str, Any]]] = []

    def asked(self, out: str, accumulation: int) -> dict[str, Any]:
        return {**self.options, "out": str(self.work / out), "accumulation": accumulation}

    def plan(self, out: str, accumulation: int) -> tuple[int, dict[str, Any]]:
        self.jobs.append((next(self.ports), self.asked(out, accumulation)))
        return self.jobs[-1]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def found(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each run: by one process, by two, and begun by one number and ended by the other."""
    work, folder = tmp_path_factory.mktemp("together"), tiny_folder("mllama")
    write_manifest(work / "skiplist.json", manifest_for(folder, every_third(folder)))
    lines = []
    for number in range(LINES):
        (work / f"{number}.png").write_bytes(tiny.picture(number))
        line = {"prompt": "what?", "answer": f"a coastal train {number}"}
        # Without an image the cross-attention layers, and the projector, have no gradient in that process.
        lines.append(json.dumps(line if number % 3 == 2 else {**line, "image": f"{number}.png"}))
    (work / "train.jsonl").write_text("\n".join(lines))
    (work / "eval.jsonl").write_text("\n".join(lines[:1]))
    given = {"manifest": "skiplist.json", "data": "train.jsonl", "eval_data": "eval.jsonl"}
    options = {name: str(work / file) for name, file in given.items()} | {
        "model": str(folder), "device": "cpu", "steps": 4, "learning_rate": 2e-2, "rank": 4,
        "max_length": 128, "save_every": 2,
    }  # fmt: skip
    runs = Trainings(work, options)
    whole, begun, ended = (runs.plan(x, BATCHES // 2) for x in ("two", "two-one", "one-two"))
    ended[1]["accumulation"] = BATCHES  # the same command, whatever the number of processes
    jobs = work / "jobs.json"
    jobs.write_text(json.dumps(runs.jobs))
    command = [sys.executable, "-m", "tests.training.second", str(jobs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second:
        one = finetune(**runs.asked("one", BATCHES))
        with pytest.raises(KeyboardInterrupt):
            finetune(**runs.asked("one-two", BATCHES), progress=stop)
        two = as_first(whole)
        with pytest.raises(KeyboardInterrupt):
            as_first(begun, progress=stop)
        one_two = as_first(ended)
        said, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors[-2000:]
    two_one = finetune(**runs.asked("two-one", BATCHES // 2))
    return {
        "work": work, "one": one, "two": two, "one-two": one_two, "two-one": two_one,
        "second": [json.loads(x) for x in said.splitlines()],
    }  # fmt: skip


def as_first(job: tuple[int, dict[str, Any]], **more: Any) -> Finetuned:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(0, job[0]).items():
            patch.setenv(name, value)
        return finetune(**job[1], **more)


@pytest.mark.parametrize("name", ["two", "one-two", "two-one"])
def test_the_losses_and_the_adapter_are_those_of_one_process(name, found):
    one, other = found["one"], found[name]
    assert dict(other.history) == pytest.approx(dict(one.history), rel=TOLERANCE)
    assert dict(other.eval_history) == pytest.approx(dict(one.eval_history), rel=TOLERANCE)
    first, second = (load_file(found["work"] / x / "adapter_model.safetensors") for x in ("one", name))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[n], second[n], rtol=1e-3, atol=1e-5) for n in first)


def test_a_run_goes_on_with_another_number_of_processes_in_steps_of_the_same_lines(found):
    begun = {name: found[name].resumed_from for name in ("one", "two", "one-two", "two-one")}
    assert begun == {"one": None, "two": None, "one-two": 2, "two-one": 2}
    assert found["one-two"].other_batches == (
        "The run began with 1 process and went on with 2: each took 1 batch of a step, so that steps kept "
        "their lines.",
    )
    assert "began with 2 processes and went on with 1: each took 2" in found["two-one"].other_batches[0]
    assert [found[x].processes for x in ("one", "two", "one-two", "two-one")] == [1, 2, 2, 1]


def test_the_second_process_ends_as_the_first_does(found):
    whole, broken, resumed = found["second"]
    assert [tuple(x) for x in whole] == list(found["two"].history)
    assert "Another one of the 2 processes of this training ended" in broken
    assert [tuple(x) for x in resumed] == list(found["one-two"].history)


def test_batches_that_do_not_divide_are_refused(found):
    from dataclasses import replace

    from qprobe.options import FinetuneOptions
    from qprobe.training.trainer import with_its_steps

    asked = FinetuneOptions(Path("f"), data=None, out=Path("out"), accumulation=3)
    assert with_its_steps(asked, 4, 2) == (replace(asked, accumulation=6), with_its_steps(asked, 4, 2)[1])
    with pytest.raises(
        RunError, match="began with 1 process and 3 batches per step, which do not divide among 2"
    ):
        with_its_steps(asked, 1, 2)


@pytest.mark.parametrize(
    ("set_", "device", "said"),
    [
        ({}, "auto", "each card holds the whole model"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None, "not set: LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, None, "set in part"),
        (environment(0, 1), "cuda:1", "--device cuda:1 is one device, and 2 processes train here"),
    ],
)
def test_processes_that_cannot_train_together_are_refused(set_, device, said):
    with pytest.raises(MachineError, match=said), together(set_, parse_device(device)):
        pass


def test_a_process_that_sees_its_own_gpu_alone_is_the_first_one_there(monkeypatch: pytest.MonkeyPatch):
    # accelerate would take the number for that of a GPU which this process does not see.
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device, number in (("cuda:0", "0"), ("cuda:3", "3"), ("cpu", "1")):
        with pytest.raises(KeyboardInterrupt), _own_number(torch.device(device)):
            assert os.environ["LOCAL_RANK"] == number
            raise KeyboardInterrupt
        assert os.environ["LOCAL_RANK"] == "1"
