"""finetune.json: what was written comes back, what is broken is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qprobe.checkpoint.adapters.record import RECORD, Record, read_record, write_record
from qprobe.errors import RunError

WHOLE = Record("finished", "f" * 64, {"seed": 0, "rank": 16}, {"history": [{"step": 1, "loss": 0.5}]})


@pytest.mark.parametrize("record", [WHOLE, Record("running", "f", {}), Record("diverged", "f", {})])
def test_a_record_comes_back_as_it_was_written(tmp_path: Path, record: Record):
    assert read_record(tmp_path) is None
    write_record(tmp_path / "new", record)
    assert read_record(tmp_path / "new") == record


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "lost"}, "the record.status is lost"),
        ({"fingerprint": 3}, "the record.fingerprint is 3"),
        ({"spec": []}, r"the record.spec is \[\]"),
        ({"more": 1}, "the record has the unknown more"),
    ],
)
def test_a_damaged_record_is_named_to_the_key(tmp_path: Path, change: dict[str, Any], said: str):
    (tmp_path / RECORD).write_text(json.dumps({**asdict(WHOLE), **change}))
    with pytest.raises(RunError, match=rf"finetune\.json is damaged \({said}.*Remove the folder"):
        read_record(tmp_path)


def test_a_record_that_is_a_folder_is_refused(tmp_path: Path):
    (tmp_path / RECORD).mkdir()
    with pytest.raises(RunError, match=r"finetune\.json cannot be read \(it is a folder\)"):
        read_record(tmp_path)
