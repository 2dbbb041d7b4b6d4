"""Work that is killed at any moment and done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qprobe
from tests.emulation import compute_bf16_by_float32
from tests.scanning.resume import kills

pytestmark = pytest.mark.slow

JOBS = {"demo": 4, "scan": 3, "calibrated": 3, "limited": 3, "weights": 4, "join": 4, "quantize": 5}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.scanning.resume.kills` found, by job."""
    folder = tmp_path_factory.mktemp("kills")
    asked = [f"{job}={count}" for job, count in JOBS.items()]
    command = [sys.executable, "-m", "tests.scanning.resume.kills", str(folder), *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# What each kind of work is for; an undisturbed run that lacks it would be compared in vain.
RESULTS = {
    "demo": {"out/layers.csv", "out/skiplist.json", "out/units/sensitivity-00000.parquet"},
    "scan": {"out/layers.csv", "out/skiplist.json", "out/units/isolated-00000.parquet"},
    "calibrated": {"out/layers.csv", "out/skiplist.json", "out/nf4-calibrated.safetensors"},
    "limited": {"out/layers.csv", "out/skiplist.json"},
    "weights": {"out/layers.csv", "out/skiplist.json", "out/units/weights-00003.parquet"},
    "join": {"out/layers.csv", "out/scan.json", "out/units/outputs-00000.parquet"},
    "quantize": {"out/model.safetensors", "out/config.json", "out/skiplist.json"},
}


@pytest.mark.parametrize("job", JOBS)
def test_work_killed_at_any_moment_ends_with_the_same_files_and_no_other(job: str, found: dict[str, Any]):
    wanted, kills = found[job]["wanted"], found[job]["kills"]
    assert wanted.keys() >= RESULTS[job] and len(kills) == JOBS[job]
    for kill in kills:
        got = kill["files"]
        assert {name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name)} == set()
    # The kills were real ones, in several parts of the work.
    assert sum(kill["status"] == -9 for kill in kills) >= JOBS[job] // 2
    left = {kill["left"] for kill in kills}
    assert len(left) >= 2 and min(left) < len(wanted)


def test_a_limit_changes_no_file_but_what_names_it(found: dict[str, Any]):
    plain, limited = found["scan"]["wanted"], found["limited"]["wanted"]
    assert {name for name in plain if plain[name] != limited.get(name)} <= {"out/notes/end.json"}


def test_scans_in_other_folders_and_processes_leave_the_same_files(
    found: dict[str, Any], tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    monkeypatch.setattr("qprobe.scanning.samples.choose_samples", kills.without_answers)
    compute_bf16_by_float32(monkeypatch.setattr)
    qprobe.scan(**kills.options(tiny_folder("llama").parent, tmp_path / "out"))
    got = kills.files(tmp_path)
    assert "out/skiplist.json" in got and got == found["scan"]["wanted"]
