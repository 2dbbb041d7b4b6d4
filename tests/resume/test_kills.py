"""A scan that is killed at any moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_scan_killed_at_any_moment_ends_with_the_same_table(tmp_path: Path):
    command = [sys.executable, "-m", "tests.resume.kills", str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    kills = found["kills"]
    assert len(kills) == 20
    assert [k["moment"] for k in kills if k["table"] != found["wanted"]] == []
    # The kills were real ones, in every part of the scan: before, among and after its units.
    assert sum(k["status"] == -9 for k in kills) >= 15
    left = {k["units"] for k in kills}
    assert 0 in left and len(left) >= 3
