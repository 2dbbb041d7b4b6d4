"""Batches made by other processes are those that one process makes, and what goes wrong in them is said."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from qprobe.data.conversation import Conversation
from qprobe.errors import RunError, SampleError
from qprobe.inputs.batch import UnreadableError
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from qprobe.manifest.write import write_manifest
from qprobe.options import FinetuneOptions
from qprobe.records import Turn
from qprobe.training import collate
from qprobe.training.finetune import finetune
from tests import tiny
from tests.checkpoint.manifests import every_third, manifest_for

ONE = FinetuneOptions(Path("f"), data=None, out=Path("out"))
GIB = 2**30


@pytest.fixture(scope="module")
def asked(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four steps of the tiny Mllama on lines of which some have an image, with checkpoints at 2 and 4."""
    work, folder = tmp_path_factory.mktemp("collate"), tiny_folder("mllama")
    write_manifest(work / "skiplist.json", manifest_for(folder, every_third(folder)))
    lines = []
    for number in range(4):
        (work / f"{number}.png").write_bytes(tiny.picture(number))
        line = {"prompt": "what?", "answer": f"a coastal train {number}"}
        lines.append(json.dumps(line if number == 2 else {**line, "image": f"{number}.png"}))
    (work / "train.jsonl").write_text("\n".join(lines))
    return {
        "manifest": work / "skiplist.json", "data": work / "train.jsonl", "model": str(folder),
        "device": "cpu", "steps": 4, "accumulation": 1, "learning_rate": 2e-2, "rank": 4, "max_length": 128,
        "save_every": 2, "held_out": 0.25,
    }  # fmt: skip


@pytest.fixture
def makers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file for each process that made a batch while training."""
    found, encode = tmp_path / "makers", collate.encode_conversations
    found.mkdir()

    def noted(*args: Any) -> Any:
        (found / str(os.getpid())).touch()
        return encode(*args)

    monkeypatch.setattr(collate, "encode_conversations", noted)
    return found


def stop(stage: str, done: int, _total: int) -> None:
    if stage == "train" and done == 3:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_workers_change_no_bit_of_a_run_nor_of_one_that_goes_on(
    asked: dict[str, Any], makers: Path, tmp_path: Path
):
    alone = finetune(**asked, workers=0, out=tmp_path / "alone")
    assert [x.name for x in makers.iterdir()] == [str(os.getpid())]
    (makers / str(os.getpid())).unlink()
    with pytest.raises(KeyboardInterrupt):
        finetune(**asked, workers=2, out=tmp_path / "ahead", progress=stop)
    ahead = finetune(**asked, workers=1, out=tmp_path / "ahead")
    there = {x.name for x in makers.iterdir()}
    assert len(there) >= 3 and str(os.getpid()) not in there
    assert ahead.resumed_from == 2
    assert (ahead.history, ahead.eval_history) == (alone.history, alone.eval_history)
    first, second = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("alone", "ahead"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.slow
def test_what_a_worker_cannot_read_is_the_sentence_it_is_without_workers(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_args: Any) -> Any:
        raise SampleError("0.png is gone. Put it back.")

    monkeypatch.setattr(collate, "encode_conversations", refuse)
    with pytest.raises(SampleError) as raised:
        finetune(**asked, workers=1, out=tmp_path / "out")
    assert str(raised.value) == "0.png is gone. Put it back."
    monkeypatch.setattr(collate, "encode_conversations", lambda *_: os._exit(3))
    with pytest.raises(RunError, match=r"A process that makes batches ahead ended \(.*pass --workers 0\."):
        finetune(**asked, workers=1, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("cores", "room", "processes", "wanted"),
    [(8, GIB, 1, 2), (8, GIB, 2, 2), (8, GIB, 3, 0), (2, GIB, 1, 0), (8, 255 * 2**20, 1, 0)],
)
def test_workers_are_taken_where_cores_and_shared_memory_suffice(
    cores: int, room: int, processes: int, wanted: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(collate.shutil, "disk_usage", lambda _: type("", (), {"free": room}))
    shown = [Conversation(1, "a", (Turn("user", ("what?", b"")),))]
    assert collate.workers_for(ONE, shown, False, processes) == wanted
    assert collate.workers_for(ONE, [replace(shown[0], turns=())], False, processes) == 0  # nothing to read
    assert collate.workers_for(ONE, shown, True, processes) == 0  # training takes the cores itself
    most = max(1, cores // processes)
    assert collate.workers_for(replace(ONE, workers=3), [], True, processes) == min(3, most)
    assert collate.workers_for(replace(ONE, workers=99), [], True, processes) == most
    assert collate.fewer_workers(replace(ONE, workers=most), processes) is None
    said = collate.fewer_workers(replace(ONE, workers=99), processes)
    assert said is not None and said.startswith("--workers 99 is more than the cores here serve, so")


def test_cores_are_counted_where_the_system_does_not_say_which_are_ours(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert collate.workers_for(replace(ONE, workers=99), [], True, 2) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert collate.workers_for(replace(ONE, workers=99), [], True, 2) == 1


@pytest.mark.slow
def test_more_workers_than_cores_are_said_once_and_not_started(
    asked: dict[str, Any], makers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    done = finetune(**{**asked, "steps": 3, "held_out": 0}, workers=9, out=tmp_path / "out")
    said = [x for x in done.notes if "--workers" in x]
    assert said == ["--workers 9 is more than the cores here serve, so 2 are started for each process that "
                    "trains: one per core."]  # fmt: skip
    assert 1 <= len(list(makers.iterdir())) <= 2 and not (makers / str(os.getpid())).exists()


def test_a_processor_that_refuses_in_a_worker_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_args: Any) -> Any:
        raise UnreadableError("Sample 'a' cannot be read: it is empty. Leave it out.", "it is empty")

    monkeypatch.setattr(collate, "encode_conversations", refuse)
    make = collate.Collate(None, torch.float32, None)
    with pytest.raises(SampleError) as raised, collate.working_ahead(1):
        next(iter(DataLoader([1], num_workers=1, collate_fn=make)))  # pyright: ignore[reportArgumentType]
    assert str(raised.value) == "Sample 'a' cannot be read: it is empty. Leave it out."


def test_a_file_that_went_away_while_training_is_named_with_its_line(tiny_folder: Any, tmp_path: Path):
    turns = (Turn("user", (tmp_path / "gone.png", "what?")), Turn("assistant", ("a train",), True))
    make = collate.Collate(load_processor(resolve(str(tiny_folder("mllama")))), torch.float32, None)
    with pytest.raises(SampleError, match=r"any more \(line 7: .*Put its files back"):
        make([Conversation(7, "line 7", turns)])
