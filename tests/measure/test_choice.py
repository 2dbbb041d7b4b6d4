"""What a choice says of itself."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, cast

import pytest

from qprobe.measure.choice import Trial
from qprobe.options import ScanOptions
from tests.report.runs import write_run


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, "--budget +10%"),
        ({"budget": "+1 GiB"}, "--budget '+1 GiB'"),
        ({"max_kl": 0.5}, "--max-kl 0.5"),
        ({"format": "nf4-calibrated"}, "--format nf4-calibrated --budget +10%"),
    ],
)
def test_the_command_names_the_model_and_no_folder_of_its_user(
    changes: dict[str, Any], asked: str, tmp_path: Path
):
    write_run(tmp_path)
    scan = json.loads((tmp_path / "scan.json").read_text())
    scan["model"]["id"] = "my model"
    (tmp_path / "scan.json").write_text(json.dumps(scan))
    options = ScanOptions(str(tmp_path / "private" / "my model"), **changes)
    trial = Trial(cast(Any, None), tmp_path, [], options, lambda *_: None)
    assert trial.command == f"qprobe scan --model 'my model' {asked}"
    assert shlex.split(trial.command)[3] == "my model"
