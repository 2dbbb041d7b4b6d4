"""Which process of several goes on to choose; `tests/scanning/resume/test_shards.py` runs them."""

from pathlib import Path

import pandas as pd
import pytest

from qprobe.errors import RunError
from qprobe.runs.folder import RunFolder
from qprobe.runs.shards import (
    SKIPLIST,
    entered,
    finishing,
    is_chosen,
    left_to_others,
    measuring,
    wait_for_units,
)
from qprobe.system.processes import Shard
from tests.runs.runs import make_run, output


def test_a_lock_that_cannot_be_written_is_explained_in_words(tmp_path: Path):
    (tmp_path / ".lock-selection").mkdir()
    with pytest.raises(RunError, match=r"cannot be written \([A-Z][^\[\]]*\)\. Make room"):  # no errno in it
        with finishing(tmp_path, Shard(), 0, "+10%"):
            pass


def test_one_scan_works_in_a_folder_at_a_time_and_its_ranks_do_together(tmp_path: Path):
    with entered(tmp_path, Shard()):
        for shard in (Shard(), Shard(0, 2)):
            with pytest.raises(RunError, match=r"Another process is scanning into .* torchrun"):
                with entered(tmp_path, shard):
                    pass
    with entered(tmp_path, Shard(0, 2)), entered(tmp_path, Shard(1, 2)):
        for shard in (Shard(), Shard(1, 2)):
            with pytest.raises(RunError, match="Another process is scanning"):
                with entered(tmp_path, shard):
                    pass
    with entered(tmp_path, Shard()):
        pass


def turn(folder: Path, shard: Shard, request: str, left: int = 0) -> str:
    with finishing(folder, shard, left, request) as found:
        if found == "ours":
            (folder / SKIPLIST).write_text(request)
        return found


def test_a_list_is_chosen_once_for_a_request_by_the_last_of_several(tmp_path: Path):
    first, second = Shard(0, 2), Shard(1, 2)
    assert turn(tmp_path, first, "+10%", left=1) == "units left"
    assert not is_chosen(tmp_path, "+10%")
    with finishing(tmp_path, second, 0, "+10%") as found:
        assert found == "ours" and turn(tmp_path, first, "+10%") == "another's"
        (tmp_path / SKIPLIST).write_text("+10%")
    assert is_chosen(tmp_path, "+10%") and not is_chosen(tmp_path, "+5%")
    assert turn(tmp_path, first, "+10%") == "chosen"
    assert turn(tmp_path, first, "+5%") == "ours"  # another request
    assert turn(tmp_path, Shard(), "+5%") == "ours"  # alone: a user started it for that
    (tmp_path / SKIPLIST).write_text("another list")
    assert not is_chosen(tmp_path, "+5%") and turn(tmp_path, first, "+5%") == "ours"


def test_a_choice_that_failed_is_made_again(tmp_path: Path):
    assert turn(tmp_path, Shard(0, 2), "+10%") == "ours"
    with pytest.raises(ValueError), finishing(tmp_path, Shard(), 0, "+10%"):
        raise ValueError
    assert not is_chosen(tmp_path, "+10%") and turn(tmp_path, Shard(0, 2), "+10%") == "ours"


def test_a_process_alone_has_nobody_to_wait_for(tmp_path: Path):
    with measuring(tmp_path, Shard()):
        assert not list(tmp_path.iterdir())
        wait_for_units(tmp_path, Shard())
    with measuring(tmp_path, Shard(1, 2)):
        assert (tmp_path / ".lock-units-1").is_file()
        wait_for_units(tmp_path, Shard(1, 2))  # for the other one alone, which is not measuring


def test_a_rank_that_does_not_choose_says_why(tmp_path: Path):
    run = RunFolder(make_run(tmp_path / "run"))  # outputs and KL of one batch, not measured
    said = {turn: left_to_others(Shard(1, 3), turn, run) for turn in ("chosen", "another's", "units left")}
    assert all(x.startswith("Rank 1 of 3 is done with its share; ") for x in said.values())
    assert f"is chosen already: {run.path / SKIPLIST}" in said["chosen"]
    assert said["another's"].endswith("another one chooses the list.")
    assert "; 2 units are left to the others" in said["units left"]
    run = RunFolder(make_run(tmp_path / "half", outputs=[pd.DataFrame([output("a", "model.a", 1.0, 0.1)])]))
    assert "; 1 unit is left to the others" in left_to_others(Shard(1, 3), "units left", run)
