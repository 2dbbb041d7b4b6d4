"""A short while of `make fuzz`, and every input that was ever a finding."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.readers import readers
from tests.fuzz.trying import CORPUS, problem, tried

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
