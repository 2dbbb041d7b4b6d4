"""Runs of calibrated weights are joined only where they measured the same weights."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest

from qprobe.errors import RunError
from qprobe.records import CodesFile, FormatSpec, Inventory, ModelIdentity, Scan
from qprobe.registry.precisions import NF4_CALIBRATED
from qprobe.runs.needed import Measures, units_left
from qprobe.runs.store import UNIT_SCHEMAS, open_run, read_scan, unit_files, update_scan, write_unit
from qprobe.scanning.join import join
from qprobe.system.versions import library_versions

FILE = "nf4-calibrated.safetensors"
SPEC = {"measures": asdict(Measures(False, False)), "calibration": [[], [], []], "held_out": []}


def run_with(folder: Path, unit: int, weights: bytes | None) -> Path:
    """A run of three batches that finished the outputs of one; weights: of its file, None for no file."""
    identity = ModelIdentity("m", None, "M", "0" * 64)
    open_run(folder, Scan(identity, FormatSpec(NF4_CALIBRATED.name), Inventory((), (), 0), SPEC))
    write_unit(folder, "outputs", unit, pd.DataFrame(columns=list(UNIT_SCHEMAS["outputs"])))
    if weights is not None:
        (folder / FILE).write_bytes(weights)
        codes = CodesFile(FILE, hashlib.sha256(weights).hexdigest())
        update_scan(folder, replace(read_scan(folder), codes=codes))
    return folder


def test_runs_of_the_same_weights_are_joined_with_the_weights(tmp_path):
    runs = [run_with(tmp_path / str(unit), unit, b"same") for unit in (0, 1)]
    joined = join(runs, tmp_path / "out")
    assert joined.missing == 2 and joined.units == 2  # one batch, and the weights
    assert (tmp_path / "out" / FILE).read_bytes() == b"same"
    assert read_scan(tmp_path / "out").codes == read_scan(runs[1]).codes is not None


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
    assert list(unit_files(out)) == ["outputs-00000.parquet"]


def test_measurements_of_weights_that_nobody_knows_are_refused(tmp_path):
    runs = [run_with(tmp_path / "0", 0, b"one"), run_with(tmp_path / "1", 1, None)]
    with pytest.raises(
        RunError, match=r"1 holds measurements of calibrated weights, but its scan.json names"
    ):
        join(runs, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"measures": {"propagated": False, "luck": True}}, "luck"),  # one more
        ({"measures": {"propagated": False}}, "sensitivity"),  # one fewer
        ({"measures": None}, "None"),
        ({"calibration": None}, "NoneType"),
    ],
)
@pytest.mark.parametrize("versions", [{"qprobe": "9.8.7"}, None])
def test_runs_of_a_version_that_measured_something_else_are_refused_before_a_folder_is_made(
    changes: dict, said: str, versions: dict | None, tmp_path
):
    run = run_with(tmp_path / "run", 0, b"same")
    update_scan(run, replace(read_scan(run), spec={**SPEC, **changes, "versions": versions}))
    wrote = r"qprobe 9\.8\.7" if versions else "a qprobe that its scan.json does not name"
    here = library_versions()["qprobe"]
    refused = (
        rf"The scan is of {wrote}, and qprobe {re.escape(here)} cannot tell .*{said}.*version that made it"
    )
    with pytest.raises(RunError, match=refused):
        join([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match=refused):
        units_left(run)
