"""A scan is never resumed with, or joined with, what was measured of something else."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qprobe.errors import RunError
from qprobe.measure import runner
from qprobe.options import ScanOptions
from qprobe.scanning import answers
from qprobe.scanning.asked.request import parse_options
from tests.scanning.asked import scan
from tests.scanning.resume.runs import options, table

# What decides the units, so that a folder of other ones is refused, or only where and how the work is done.
IN_THE_SPECIFICATION = {
    "model", "images", "data", "prompt", "samples", "format", "device", "dtype", "seed", "batch_size",
    "max_new_tokens", "measures", "nodes", "tune", "calibration_samples", "drawn_texts", "turns", "split",
    "bad_data", "allow_downloads", "experts",
}  # fmt: skip
NO_PART = {"out", "check", "max_memory", "keep_correction", "trust_remote_code", "processor", "progress"}


class Stopped(Exception):
    """What a test raises in place of a kill."""


def stop_at(call: int, real: Any) -> Any:
    """`real`, which raises Stopped the `call`-th time."""
    calls: list[int] = []

    def counting(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Stopped
        return real(*arguments, **more)

    return counting


@pytest.mark.slow
def test_weights_that_change_in_any_place_are_noticed(llama: Path, tmp_path: Path, monkeypatch):
    run, changed = tmp_path / "run", Path(copytree(llama, tmp_path / "llama"))
    lines = [{"prompt": f"what is {n}", "answer": "a bag"} for n in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = options(changed, run, data=tmp_path / "data.jsonl", measures=("activation",))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "observe", stop_at(2, runner.observe))
        with pytest.raises(Stopped):
            scan(**asked)
    tensors = load_file(changed / "model.safetensors")
    last = sorted(name for name in tensors if "mlp.up_proj" in name)[-1]
    tensors[last][-1, -1] *= 1.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"holds another scan, which differs in 1 place: spec\.weights: "):
        scan(**asked)


@pytest.mark.slow
def test_answers_of_before_a_change_are_not_mixed_with_those_after(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changed = Path(copytree(llama, tmp_path / "llama"))
    with monkeypatch.context() as patch:
        patch.setattr(answers, "answer_group", stop_at(3, answers.answer_group))
        with pytest.raises(Stopped):
            scan(**options(changed, tmp_path / "run"))
    assert len(list((tmp_path / "run" / "answers").iterdir())) == 2
    template = changed / "chat_template.jinja"
    template.write_text("now: " + template.read_text())
    resumed = scan(**options(changed, tmp_path / "run")).run
    fresh = scan(**options(changed, tmp_path / "fresh")).run
    assert table(resumed) == table(fresh)
    with monkeypatch.context() as patch:  # as other libraries would answer
        patch.setattr(answers, "library_versions", lambda: {"transformers": "9.9"})
        patch.setattr(answers, "answer_group", stop_at(1, answers.answer_group))
        with pytest.raises(Stopped):
            scan(**options(changed, resumed))


@pytest.mark.slow
def test_whether_an_answer_ends_is_part_of_what_is_measured(llama: Path, tmp_path: Path, monkeypatch):
    run = tmp_path / "run"
    scan(**options(llama, run, measures=("activation",)))

    def ending(*asked: Any) -> Any:
        return [replace(s, ends=not s.ends) for s in real(*asked)]

    real = answers.answer_group
    monkeypatch.setattr(answers, "answer_group", ending)
    for path in (run / "answers").iterdir():
        path.unlink()
    with pytest.raises(RunError, match=r"differs in .*ends: "):
        scan(**options(llama, run, measures=("activation",)))


def test_whatever_the_units_do_not_depend_on_is_part_of_the_request():
    other: dict[str, Any] = {
        "budget": "+7%",
        "max_kl": 0.5,
        "by": "weight_nmse",
        "for_tool": "vllm",
        "ablate": "3",
        "metric": "exact",
        "check_data": [{"prompt": "what?", "answer": "this"}],
    }
    left = {field.name for field in fields(ScanOptions)} - IN_THE_SPECIFICATION - NO_PART
    assert left == other.keys()
    requests = [parse_options(ScanOptions("demo", **{name: value})) for name, value in other.items()]
    asked = {request.after_units for request in requests}
    assert len(asked | {parse_options(ScanOptions("demo")).after_units}) == len(other) + 1
