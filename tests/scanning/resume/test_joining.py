"""Runs of calibrated weights are joined only where they measured the same weights."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from qprobe.errors import RunError
from qprobe.records import CodesFile, FormatSpec, Inventory, ModelIdentity
from qprobe.registry.precisions import NF4_CALIBRATED
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import VERSION, Key, Measures, Spec
from qprobe.scanning.join import join
from qprobe.system.versions import library_versions

FILE = "nf4-calibrated.safetensors"
SPEC = Spec("weights", "cpu", Measures(False, False), calibration=((), (), ()), versions=library_versions())


def run_with(folder: Path, unit: int, weights: bytes | None) -> Path:
    """A run of three batches that finished the outputs of one; weights: of its file, None for no file."""
    identity = ModelIdentity("m", None, "M", "0" * 64)
    run = RunFolder(folder)
    run.open(Key(VERSION, identity, FormatSpec(NF4_CALIBRATED.name), Inventory((), (), 0), SPEC))
    run.write_unit("outputs", unit, pd.DataFrame())
    if weights is not None:
        (folder / FILE).write_bytes(weights)
        run.notes.put("codes", CodesFile(FILE, hashlib.sha256(weights).hexdigest()))
    return folder


def test_runs_of_the_same_weights_are_joined_with_the_weights(tmp_path):
    runs = [run_with(tmp_path / str(unit), unit, b"same") for unit in (0, 1)]
    joined = join(runs, tmp_path / "out")
    assert joined.missing == 2 and joined.units == 2  # one batch, and the weights
    assert (tmp_path / "out" / FILE).read_bytes() == b"same"
    assert RunFolder(tmp_path / "out").codes == RunFolder(runs[1]).codes is not None


def test_runs_of_other_weights_are_refused_before_anything_is_copied(tmp_path):
    runs = [run_with(tmp_path / str(unit), unit, weights) for unit, weights in enumerate((b"one", b"other"))]
    one, other = (hashlib.sha256(weights).hexdigest()[:16] for weights in (b"one", b"other"))
    with pytest.raises(RunError, match=rf"were calibrated apart \(SHA-256 {one} and {other}\)"):
        join(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_folder_holds_already_counts_too(tmp_path):
    out = run_with(tmp_path / "out", 0, b"one")
    with pytest.raises(RunError, match="were calibrated apart"):
        join([run_with(tmp_path / "other", 1, b"other")], out)
    assert RunFolder(out).unit_files() == ["outputs-00000.parquet"]


def test_measurements_of_weights_that_nobody_knows_are_refused(tmp_path):
    runs = [run_with(tmp_path / "0", 0, b"one"), run_with(tmp_path / "1", 1, None)]
    with pytest.raises(RunError, match=r"1 holds measurements of calibrated weights, but its notes name"):
        join(runs, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"measures": {**asdict(Measures(False, False)), "luck": True}}, "luck"),  # one more
        ({"measures": {"propagated": False}}, "sensitivity"),  # one fewer
        ({"measures": None}, "None"),
        ({"calibration": None}, "null"),
    ],
)
@pytest.mark.parametrize("versions", [{"qprobe": "9.8.7"}, None])
def test_runs_of_a_version_that_measured_something_else_are_refused_before_a_folder_is_made(
    changes: dict, said: str, versions: dict | None, tmp_path
):
    run = run_with(tmp_path / "run", 0, b"same")
    key = json.loads((run / "scan.json").read_text())
    key["spec"] |= {**changes, "versions": versions}
    (run / "scan.json").write_text(json.dumps(key))
    wrote = r"qprobe 9\.8\.7" if versions else "a qprobe that its scan.json does not name"
    here = library_versions()["qprobe"]
    refused = (
        rf"The scan is of {wrote}, and qprobe {re.escape(here)} cannot tell .*{said}.*version that made it"
    )
    with pytest.raises(RunError, match=refused):
        join([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match=refused):
        _ = RunFolder(run).units_left


def test_a_run_of_another_format_of_folders_is_refused(tmp_path):
    run = run_with(tmp_path / "run", 0, b"same")
    text = (run / "scan.json").read_text()
    (run / "scan.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(RunError, match=r"its format is version 2, not 1\). Use the version that made it"):
        join([run], tmp_path / "out")
