"""Where a training run goes on, and what it leaves of one that was asked for otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qprobe.checkpoint.adapters.record import Record, write_record
from qprobe.training.alone import CHECKPOINTS, goes_on, last_checkpoint, start_record


def test_half_written_checkpoints_are_removed(tmp_path: Path):
    assert last_checkpoint(tmp_path / "nothing") is None
    for number, state in ((9, "{}"), (10, "{}"), (12, '{"glob'), (14, None)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize(
    ("before", "is_continued"),
    [
        (Record("running", "f", {"rank": 2}, processes=3), True),
        (Record("diverged", "f", {"rank": 2}, processes=3), False),
        (Record("running", "f", {"rank": 4}, processes=3), False),
    ],
)
def test_nothing_is_gone_on_from_that_diverged_or_was_asked_for_otherwise(
    before: Record, is_continued: bool, tmp_path: Path
):
    # What comes before the first step, such as distilling, is done exactly where a run does not go on.
    checkpoint = tmp_path / CHECKPOINTS / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    begun = replace(before, status="running", spec={"rank": 2}, processes=1)
    write_record(tmp_path, before)
    assert goes_on(tmp_path, begun.spec) == is_continued
    assert start_record(tmp_path, begun).processes == (3 if is_continued else 1)
    assert checkpoint.exists() == is_continued
