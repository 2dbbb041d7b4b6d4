"""A short while of `make fuzz`, and every input that was ever a finding."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from tests.fuzz.readers import readers
from tests.fuzz.trying import CORPUS, problem, tried, watched

PAST = sorted(path for path in CORPUS.glob("*/*"))


@pytest.mark.slow
def test_every_reader_explains_what_it_does_not_read(tmp_path: Path):
    counts, findings = tried(tmp_path, seconds=12, seed=1)
    assert not findings and min(counts.values()) > 0  # how many there are is up to the machine


@pytest.mark.slow
def test_good_files_are_read_and_past_findings_explained(tmp_path: Path):
    found = readers(tmp_path)
    for reader in found.values():
        for seed in reader.seeds:
            assert problem(reader, seed) is None
    for path in PAST:
        assert problem(found[path.parent.name], path.read_bytes()) is None, path


def test_an_input_that_hangs_ends_the_process_and_stays_with_its_traceback(tmp_path: Path):
    kept, said = tmp_path / "hung" / "list", tmp_path / "stderr"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        with watched(kept, b"the input", limit_s=0.2):
            time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert kept.read_bytes() == b"the input"
    assert re.search(r"Timeout .*line \d+ in test_an_input_that_hangs", said.read_text(), re.DOTALL)


def test_an_input_that_is_read_in_time_leaves_nothing(tmp_path: Path):
    with watched(tmp_path / "hung" / "list", b"x"):
        pass
    assert not list((tmp_path / "hung").iterdir())
