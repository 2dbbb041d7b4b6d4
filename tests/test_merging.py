"""Joining run folders never mixes what was measured on different weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qprobe.errors import RunError
from qprobe.measure.store import read_scan, unit_files, update_scan
from qprobe.merging import merge
from qprobe.records import CodesFile
from tests.choosing.runs import make_run, rows


def calibrated(folder: Path, sha256: str) -> Path:
    """A run with one unit, measured on the codes of that hash."""
    make_run(folder, sensitivity=[rows("sensitivity", ("s", "model.a", 1, 0.5))])
    update_scan(folder, replace(read_scan(folder), codes=CodesFile("codes.safetensors", sha256)))
    return folder


def test_runs_calibrated_apart_are_refused_before_anything_is_copied(tmp_path: Path):
    one, other = calibrated(tmp_path / "one", "a" * 64), calibrated(tmp_path / "other", "b" * 64)
    with pytest.raises(RunError, match=r"calibrated apart.*aaaaaaaaaaaa and bbbbbbbbbbbb"):
        merge([one, other], tmp_path / "out")
    assert not (tmp_path / "out" / "scan.json").exists() and not (tmp_path / "out" / "units").exists()


def test_a_folder_of_other_codes_is_not_merged_into(tmp_path: Path):
    one, other = calibrated(tmp_path / "one", "a" * 64), calibrated(tmp_path / "other", "b" * 64)
    before = {name: path.read_bytes() for name, path in unit_files(other).items()}
    with pytest.raises(RunError, match="calibrated apart"):
        merge([one], other)
    codes = read_scan(other).codes
    assert codes is not None and codes.sha256 == "b" * 64
    assert {name: path.read_bytes() for name, path in unit_files(other).items()} == before
