"""A scan that is shared among processes, one after the other or at once, and joined."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from qprobe.errors import MachineError, RunError
from qprobe.loading.spread import device_of
from qprobe.manifest.read import read_manifest
from qprobe.runs.folder import RunFolder
from qprobe.runs.shards import entered, finishing
from qprobe.scanning.join import join
from qprobe.system.devices import parse_device
from qprobe.system.processes import Shard, shard_from
from tests.scanning.asked import scan
from tests.scanning.resume.runs import Share, contents, options, table, units

pytestmark = pytest.mark.slow

# Two processes ------------------------------------------------------------------------------------------


def hold(path: Path) -> Any:
    """A lock of the file as another process holds it: locks belong to the open file, not to the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def test_a_second_scan_into_a_folder_is_refused_and_changes_nothing(llama: Path, whole: Path, tmp_path: Path):
    run = Path(copytree(whole, tmp_path / "run"))
    with (
        hold(run / ".lock"),
        pytest.raises(RunError, match=r"Another process is scanning into .*run.*torchrun"),
    ):
        scan(**options(llama, run))
    assert units(run) == units(whole)
    assert scan(**options(llama, run)).skiplist is not None  # the lock is gone with its holder


def test_ranks_of_one_scan_may_enter_together_and_nobody_else(tmp_path: Path):
    with entered(tmp_path, Shard(0, 2)), entered(tmp_path, Shard(1, 2)):
        for other in (Shard(), Shard(0, 2), Shard(1, 3)):
            with pytest.raises(RunError, match="Another process"), entered(tmp_path, other):
                pass
    with entered(tmp_path, Shard()):
        pass


def test_one_process_chooses_and_none_before_all_units_are_there(tmp_path: Path):
    asked = "+10%"
    with (
        finishing(tmp_path, Shard(0, 2), 1, asked) as early,
        finishing(tmp_path, Shard(1, 2), 0, asked) as first,
        finishing(tmp_path, Shard(0, 2), 0, asked) as second,
    ):
        assert (early, first, second) == ("units left", "ours", "another's")


def test_who_comes_late_chooses_only_what_nobody_chose(tmp_path: Path):
    def turn(shard: Shard, asked: str, writes: str | None = "a list") -> str:
        with finishing(tmp_path, shard, 0, asked) as found:
            if found == "ours" and writes is not None:
                (tmp_path / "skiplist.json").write_text(writes)
        return found

    one, other, alone = Shard(0, 2), Shard(1, 2), Shard()
    assert turn(one, "+10%", writes=None) == "ours"  # and left no list
    assert [turn(s, "+10%") for s in (one, other, one)] == ["ours", "chosen", "chosen"]
    assert [turn(s, "+20%") for s in (one, other)] == ["ours", "chosen"]
    assert turn(alone, "+20%") == "ours"
    assert turn(alone, "+10%", writes="another list") == "ours"
    assert turn(other, "+20%") == "ours"  # the list that lies there is for another budget by now
    (tmp_path / "skiplist.json").write_text("put there by hand")
    assert turn(other, "+20%") == "ours"
    with pytest.raises(KeyboardInterrupt), finishing(tmp_path, alone, 0, "+20%"):
        raise KeyboardInterrupt
    assert turn(other, "+20%") == "ours"


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_a_locked_file_is_open_for_whatever_a_network_file_system_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
):
    def of_nfs(file: Any, operation: int) -> None:
        wanted = os.O_RDONLY if operation & fcntl.LOCK_SH else os.O_WRONLY
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE not in (wanted, os.O_RDWR):
            raise OSError(errno.EBADF, "Bad file descriptor")
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    shard = Shard(0, 2) if kind == fcntl.LOCK_SH else Shard()
    with pytest.raises(RunError, match="Another process"), entered(tmp_path, shard):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_worked_on_without(tmp_path: Path, monkeypatch, code: int):
    def none_here(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none_here)
    with entered(tmp_path, Shard()), finishing(tmp_path, Shard(), 0, "") as turn:
        assert turn == "ours"


# Shares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, Shard()),
        ({"LOCAL_RANK": "3"}, Shard()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Shard()),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Shard(5, 8, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, Shard(2, 3)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Shard(5, 8, 1, 4)),
    ],
)
def test_the_variables_say_which_process_this_is(environment: dict[str, str], shard: Shard):
    assert shard_from(environment) == shard


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "two"},
    ],
)
def test_variables_that_make_no_sense_are_shown(environment: dict[str, str]):
    with pytest.raises(MachineError, match=r"RANK=.*WORLD_SIZE=.*Set RANK from 0 to WORLD_SIZE - 1"):
        shard_from(environment)


def test_shares_are_disjoint_and_complete_and_do_not_move_when_units_finish():
    everything = range(11)
    for world in (1, 2, 3, 5, 20):
        shares = [Shard(rank, world).own(everything) for rank in range(world)]
        assert sorted(unit for share in shares for unit in share) == list(everything)
        missing = [u for u in everything if u != 4]  # whoever looks later sees less to do
        assert [Shard(r, world).own(missing) for r in range(world)] == [
            [u for u in share if u != 4] for share in shares
        ]
        assert all(sorted(Shard(r, world).rotated(everything)) == list(everything) for r in range(world))


def device(shard: Shard, asked: str | None) -> str:
    return str(device_of(shard, parse_device(asked)))


def test_each_rank_has_the_gpu_of_its_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert device(Shard(5, 8, 1), None) == "cuda:1" == device(Shard(5, 8, 1), "cuda")
    assert device(Shard(5, 8, 1), "cuda:0") == "cuda:0" and device(Shard(5, 8, 1), "cpu") == "cpu"
    assert device(Shard(), None) == "" and device(Shard(1, 2), "cuda") == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device(Shard(5, 8, 1), None) == ""


def test_a_rank_that_sees_one_gpu_takes_it_and_one_beyond_those_it_sees_is_told(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert device(Shard(3, 4, 3), None) == "cuda:0" == device(Shard(3, 4, 3), "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert device(Shard(2, 4, 2), None) == "cuda:2"
    with pytest.raises(MachineError, match=r"^LOCAL_RANK=3 .* sees 3\. .*--device"):
        device(Shard(3, 4, 3), None)
    assert device(Shard(3, 4, 3), "cuda:1") == "cuda:1"


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_one_after_the_other_in_one_folder_give_the_same_table(
    world: int, whole: Path, share: Share, tmp_path: Path
):
    run = tmp_path / "run"
    results = [share(rank, world, run) for rank in reversed(range(world))]
    *early, last = results
    assert all(r.skiplist is None and "left to the others" in r.verdict for r in early)
    assert last.skiplist is not None and RunFolder(run).scan.status == "finished"
    assert table(run) == table(whole) and units(run) == units(whole)


def test_a_rank_that_is_late_says_that_the_list_is_chosen(
    llama: Path, whole: Path, share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Path(copytree(whole, tmp_path / "run"))
    before = contents(run)
    with monkeypatch.context() as patch:
        patch.setattr("qprobe.scanning.finish.choose", lambda *_: pytest.fail("chosen again"))
        late = share(1, 2, run)
    assert late.skiplist is None and f"chosen already: {run / 'skiplist.json'}" in late.verdict
    assert contents(run) == before
    again = scan(**options(llama, run, budget="+40%"))
    assert again.skiplist is not None
    assert read_manifest(again.skiplist).budget.requested == "+40%"


def test_shares_joined_in_any_order_give_the_same_table(whole: Path, share: Share, tmp_path: Path):
    for world in (2, 3):
        parts = [tmp_path / f"{rank}-of-{world}" for rank in range(world)]
        for rank, part in enumerate(parts):
            assert share(rank, world, part).skiplist is None and not (part / "layers.csv").exists()
        for number, order in enumerate(permutations(parts)):
            joined = join(order, tmp_path / f"joined-{world}-{number}")
            assert joined.missing == 0 and joined.notes == ()
            assert table(joined.run) == table(whole)
            for file in ("peaks.csv", "ranks.csv", "samples.json"):
                assert (joined.run / file).read_bytes() == (whole / file).read_bytes()


def test_a_joined_folder_is_resumed_by_the_scan_that_chooses(
    llama: Path, whole: Path, share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parts = [tmp_path / str(rank) for rank in range(2)]
    for rank, part in enumerate(parts):
        share(rank, 2, part)
    run = join(parts, parts[0]).run  # into one of them
    for name in ("observe", "observe_isolated", "observe_weights"):
        monkeypatch.setattr(f"qprobe.measure.runner.{name}", lambda *_: pytest.fail("measured again"))
    result = scan(**options(llama, run))
    assert result.skiplist is not None and units(run) == units(whole)


def test_overlapping_shares_count_once(whole: Path, share: Share, tmp_path: Path):
    share(1, 2, tmp_path / "one")
    joined = join([whole, tmp_path / "one", whole], tmp_path / "joined")
    assert table(joined.run) == table(whole) and joined.units == len(units(whole))


def test_a_join_that_lacks_a_share_says_how_much(share: Share, tmp_path: Path):
    share(1, 2, tmp_path / "one")
    joined = join([tmp_path / "one"], tmp_path / "joined")
    # Of three batches the second is there; each of the other two lacks three stages. Of the two batches of
    # isolated KL the first lacks, and so do the weights.
    assert joined.missing == 2 * 3 + 1 + 1 and not (joined.run / "layers.csv").exists()


def test_the_same_unit_with_other_numbers_is_chosen_alike_in_any_order(whole: Path, tmp_path: Path):
    other = Path(copytree(whole, tmp_path / "other"))
    (path,) = (other / "units").glob("kl-00001.parquet")
    frame = RunFolder(other).units("kl").iloc[2:4].assign(kl_sum=lambda f: f["kl_sum"] * (1 + 1e-12))
    RunFolder(other).write_unit("kl", 1, frame)
    assert path.read_bytes() != (whole / "units" / path.name).read_bytes()
    joined = [join(o, tmp_path / str(i)) for i, o in enumerate(permutations([whole, other]))]
    assert units(joined[0].run) == units(joined[1].run)
    assert joined[0].notes == joined[1].notes and "kl-00001" in joined[0].notes[0]


def test_runs_of_different_scans_are_not_joined(llama: Path, whole: Path, tmp_path: Path):
    other = scan(**options(llama, tmp_path / "other", nodes=1)).run
    with pytest.raises(RunError, match=r"are different scans: 1 place: spec\.measures\.nodes: 2 -> 1\."):
        join([whole, other], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    with pytest.raises(RunError, match="no run folder"):
        join([whole, tmp_path / "nothing"], tmp_path / "joined")
    with pytest.raises(RunError, match="nothing to join"):
        join([], tmp_path / "joined")


def test_a_damaged_unit_is_not_joined(whole: Path, tmp_path: Path):
    other = Path(copytree(whole, tmp_path / "other"))
    path = other / "units" / "kl-00000.parquet"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RunError, match=r"other.*kl-00000\.parquet is damaged"):
        join([whole, other], tmp_path / "joined")


def test_torchrun_shares_a_scan(llama: Path, whole: Path, tmp_path: Path):
    world, run = 2, tmp_path / "run"  # other numbers of processes: above, one after the other
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["-m", "tests.scanning.resume.emulated"]
    asked = options(llama, run)
    command += ["scan", "--json", "--model", str(llama), "--out", str(run), "--device", "cpu"]
    command += ["--samples", str(asked["samples"]), "--batch-size", str(asked["batch_size"])]
    command += ["--max-new-tokens", str(asked["max_new_tokens"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["skiplist"] == str(run / "skiplist.json")  # one object, of one process
    assert done.stderr.count("is done with its share") == world - 1
    assert table(run) == table(whole) and units(run) == units(whole)
