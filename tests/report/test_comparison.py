"""The comparison left in a run folder: read back whole, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qprobe.errors import RunError
from qprobe.manifest.write import write_manifest
from qprobe.records import Score
from qprobe.report.comparison import FILE, read_comparison
from qprobe.report.write import page_of
from qprobe.runs.folder import RunFolder
from qprobe.runs.scored import scored
from qprobe.selection.select import select
from tests.report.full_run import write_comparison, write_full_run

METRIC = scored("exact", True, {"16-bit": [Score(1.0, 1)], "nf4": [Score(0.0, 1)]}).to_json()


def is_current(folder: Path) -> bool:
    return b'"comparison_is_current":true' in page_of(RunFolder(folder))


@pytest.mark.slow
def test_a_comparison_of_another_list_is_told_apart(tmp_path: Path):
    folder = write_full_run(tmp_path)
    write_comparison(folder)
    assert is_current(folder)
    write_manifest(folder / "skiplist.json", select(folder, "+40%"))
    assert not is_current(folder)


def test_no_comparison_is_none(tmp_path: Path):
    assert read_comparison(RunFolder(tmp_path)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [{"name": "nf4"}]},
        {"rows": [{"name": "nf4", "parameter_bytes": 1, "total_bytes": 1, "kl": "1", "kl_se": None}]},
        {"samples": [{"id": "a", "prompt": "b", "answers": {"nf4": 3}}]},
        {"samples": 3},
        {"skip_modules": [1]},
        {"metrics": None},
        {"metrics": [{**METRIC, "samples": "2"}]},
        {"metrics": [{**METRIC, "means": {"nf4": {"value": "high", "se": None}}}]},
        {"metrics": [{**METRIC, "differences": [{"model": "nf4", "against": "16-bit"}]}]},
    ],
)
def test_a_damaged_comparison_is_refused(tmp_path: Path, change: dict):
    whole = {"rows": [], "metrics": [METRIC], "samples": [], "skip_modules": []}
    (tmp_path / FILE).write_text(json.dumps(whole))
    assert read_comparison(RunFolder(tmp_path)) == whole
    (tmp_path / FILE).write_text(json.dumps({**whole, **change}))
    with pytest.raises(RunError, match=r"compare\.json is damaged"):
        read_comparison(RunFolder(tmp_path))
