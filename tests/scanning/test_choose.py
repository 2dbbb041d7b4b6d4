"""What a selection says of itself."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qprobe.cli.scan import scan as scan_cli
from qprobe.options import DEFAULT_BUDGET, ScanOptions
from qprobe.scanning.asked.recorded import scan_call, scan_command

EVERY_OPTION: dict[str, Any] = {
    "images": Path("/home/me/my photos"),
    "data": Path("/home/me/lines.jsonl"),
    "prompt": "What is it?",
    "samples": 7,
    "format": "nf4-calibrated",
    "budget": "+1 GiB",
    "max_kl": 0.5,
    "dtype": "float16",
    "seed": 3,
    "batch_size": 2,
    "max_new_tokens": 9,
    "by": "activation_nmse",
    "measures": ("weight", "activation"),
    "for_tool": "vllm",
    "nodes": 3,
    "ablate": "5",
    "metric": "contains",
    "tune": 20,
    "calibration_samples": 40,
    "drawn_texts": 64,
    "keep_correction": 8,
    "check_data": Path("other rows.jsonl"),
    "turns": "last",
    "split": "test",
    "bad_data": "skip",
    "allow_downloads": True,
    "trust_remote_code": True,
    "experts": "16-bit",
}
# Where it runs and is written, whom it tells, and a model's name.
NO_RESULT = {"model", "processor", "out", "check", "device", "max_memory", "progress"}


def test_every_option_that_can_change_a_result_is_tried_here():
    assert {x.name for x in fields(ScanOptions)} - NO_RESULT == EVERY_OPTION.keys()


def is_short(sample: Any, answer: str) -> bool:
    return len(answer) < 9


@pytest.mark.parametrize("name", EVERY_OPTION)
def test_the_recorded_line_of_python_asks_for_the_same_scan(name: str, tmp_path: Path):
    asked = ScanOptions(str(tmp_path / "my model"), **{"budget": "+5%", name: EVERY_OPTION[name]})
    line = scan_call(asked, "my model", "")
    assert "/" not in line
    given: dict[str, Any] = {}
    scans = SimpleNamespace(scan=lambda model, **more: given.update(model=model, **more))
    exec(line, {"qprobe": scans})
    bare = {k: v.name if isinstance(v, Path) else v for k, v in vars(asked).items()}
    budget = None if asked.max_kl is not None else asked.budget
    assert ScanOptions(**given) == ScanOptions(**{**bare, "model": "my model", "budget": budget})


def test_what_lies_in_memory_has_a_name_in_the_recorded_line():
    asked = ScanOptions("x", data=[{"prompt": "a"}], metric=is_short, device="cpu", out=Path("/home/me"))
    assert scan_call(asked, None, "LlamaForCausalLM") == (
        "qprobe.scan(model, processor=processor, data=rows, metric=is_short, budget='+10%')"
        "  # model: a loaded LlamaForCausalLM"
    )


@pytest.mark.parametrize("name", EVERY_OPTION)
def test_the_recorded_command_asks_for_the_same_scan_and_names_no_folder_of_its_user(
    name: str, tmp_path: Path
):
    asked = ScanOptions(str(tmp_path / "private" / "my model"), **{name: EVERY_OPTION[name]})
    command = scan_command(asked, "my model")
    assert "/" not in command
    words = shlex.split(command)
    assert words[:2] == ["qprobe", "scan"]
    given = scan_cli.make_context("scan", words[2:]).params
    del given["as_json"]
    bare = {k: Path(v.name) if isinstance(v, Path) else v for k, v in vars(asked).items()}
    budget = None if asked.max_kl is not None else asked.budget or DEFAULT_BUDGET
    assert ScanOptions(**given) == ScanOptions(**{**bare, "model": "my model", "budget": budget})
    assert scan_command(ScanOptions("m"), "my model") == "qprobe scan --model 'my model' --budget +10%"
