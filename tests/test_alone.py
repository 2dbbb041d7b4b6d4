"""A command that runs alone is measured alone, and ends with all that it started."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.alone import run_alone
from tests.benchmarks.full_size_parts import run

MIB = 2**20
# As torchrun does it: the worker has a session of its own.
PARENT = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(str(worker.pid))
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # which nobody may come to collect
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_a_benchmark_that_takes_too_long_is_killed_with_its_workers(tmp_path: Path):
    ran = run(["-c", PARENT, str(tmp_path / "pid")], 2)
    assert ran.found is None and ran.why == "killed after 2 s" and 2 <= ran.seconds < 60
    worker = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not is_running(worker):
            return
        time.sleep(0.05)
    raise AssertionError(f"{worker} still runs")


def test_the_peak_is_that_of_the_command_and_of_what_it_started():
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert own * (1 if sys.platform == "darwin" else 1024) > 100 * MIB  # pytest's, with all it imported
    assert run_alone([sys.executable, "-c", "print({})"]).peak_bytes < 60 * MIB
    large = "x = b'x' * (150 * 2**20)"
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {large!r}])"
    assert 150 * MIB < run_alone([sys.executable, "-c", inner]).peak_bytes < 220 * MIB


def test_what_a_command_says_and_how_it_ends():
    done = run_alone([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"])
    assert (done.status, done.out, done.err) == (1, "out\n", "err\n")
    assert run(["-c", "print('{\"a\": 1}')"], 60).found == {"a": 1}
    failed = run(["-c", "import os; os.kill(os.getpid(), 9)"], 60)  # not for its time
    assert failed.found is None and failed.why == "ended with status -9"
