"""Work that is killed at any moment and done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import kills

pytestmark = pytest.mark.slow

# Twelve kills, every command among them; `python -m tests.benchmarks.kills` tries sixty.
JOBS = {
    "scan": 2, "calibrated": 2, "limited": 0, "select": 1, "report": 1, "compare": 1, "join": 1,
    "quantize": 1, "finetune": 2, "merge": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `tests.benchmarks.kills` found, by job."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.kills",
        "--json",
        *(f"{x}={n}" for x, n in JOBS.items()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# What each kind of work is for; an undisturbed run that lacks it would be compared in vain.
RESULTS = {
    "scan": {
        "layers.csv",
        "skiplist.json",
        "units/isolated-00000.parquet",
        "units/sensitivity-00000.parquet",
    },
    "calibrated": {"layers.csv", "skiplist.json", "nf4-calibrated.safetensors"},
    "limited": {"layers.csv", "skiplist.json"},
    "select": {"layers.csv", "skiplist.json", "skiplist-measured.json"},
    "report": {"report/index.html", "report/spikes.png"},
    "compare": {"compare.json"},
    "join": {"layers.csv", "scan.json", "units/outputs-00000.parquet"},
    "quantize": {"model.safetensors", "config.json", "skiplist.json"},
    "finetune": {"adapter_model.safetensors", "finetune.json", "skiplist.json"},
    "merge": {"model.safetensors", "config.json"},
}


@pytest.mark.parametrize("job", JOBS)
def test_work_killed_at_any_moment_ends_with_the_same_files_and_no_other(job: str, found: dict[str, Any]):
    assert found[job]["wanted"].keys() >= {f"out/{name}" for name in RESULTS[job]}
    assert len(found[job]["kills"]) == JOBS[job]
    for kill in found[job]["kills"]:
        assert kill["status"] in (0, -signal.SIGKILL), kill["said"]
        assert kills.differing(found[job], kill) == []


def test_the_kills_were_real_ones_in_several_parts_of_the_work(found: dict[str, Any]):
    tried = [(job, kill) for job, one in found.items() for kill in one["kills"]]
    assert sum(kill["status"] == -signal.SIGKILL for _, kill in tried) >= len(tried) * 2 // 3
    left = {job: [k["left"] - k["before"] for j, k in tried if j == job] for job in JOBS}
    assert len({x for of in left.values() for x in of}) >= 4 and any(len(set(of)) > 1 for of in left.values())


def test_a_limit_changes_no_file_but_what_names_it(found: dict[str, Any]):
    plain, limited = found["scan"]["wanted"], found["limited"]["wanted"]
    assert {name for name in plain if plain[name] != limited.get(name)} <= {"out/notes/end.json"}


def test_scans_in_other_folders_and_processes_leave_the_same_files(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    kills.prepare(tmp_path)
    kills.scanned(tmp_path, tmp_path / "place" / "out")
    got = kills.files(tmp_path / "place")
    assert "out/skiplist.json" in got and got == found["scan"]["wanted"]
