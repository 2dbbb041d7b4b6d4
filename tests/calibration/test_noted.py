"""What is noted of each layer that was calibrated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qprobe.calibration import calibrate
from qprobe.calibration.codes import Rounded
from qprobe.runs.folder import RunFolder
from tests.runs.runs import make_run


def test_a_layer_whose_error_is_not_known_has_none_and_no_other_loses_its_own(tmp_path: Path):
    work: Any = SimpleNamespace(run=RunFolder(make_run(tmp_path / "run")))
    found = {"model.a": Rounded(None, 0.5, 0.01, "no gain"), "model.b": Rounded(None, why="not finite")}
    calibrate._finish(work, found, tokens=7, unit=0)
    rows = RunFolder(tmp_path / "run").units("calibration")
    assert rows["layer"].tolist() == ["model.a", "model.b"]
    for column, known in (("error", 0.5), ("damping", 0.01)):
        assert rows[column].isna().tolist() == [False, True] and rows[column][0] == known
