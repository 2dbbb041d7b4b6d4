"""A run folder from elsewhere leads no writer out of it: links, pipes and names with a way in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qprobe.checkpoint.adapters.record import Record, write_record
from qprobe.errors import QprobeError, RunError
from qprobe.records import CodesFile
from qprobe.report.write import write_report
from qprobe.runs.folder import RunFolder
from qprobe.runs.shards import entered, finishing
from qprobe.scanning.join import join
from qprobe.selection.replaced import select_into
from qprobe.system.processes import Shard
from qprobe.training.alone import check_out
from tests.report.runs import write_run
from tests.runs.runs import make_run
from tests.scanning.resume.test_joining import run_with

TWO = Shard(0, 2)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that nothing may change, with a file in it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_bytes(b"precious")
    return folder


def unchanged(outside: Path) -> bool:
    return {x.name: x.read_bytes() for x in outside.iterdir()} == {"file": b"precious"}


@pytest.mark.parametrize("name", ["units", "notes"])
def test_a_scan_writes_through_no_linked_folder(tmp_path: Path, outside: Path, name: str):
    run = make_run(tmp_path / "run")
    key = RunFolder(run).key
    for path in (run / name).iterdir():
        path.unlink()
    (run / name).rmdir()
    (run / name).symlink_to(outside, target_is_directory=True)
    with pytest.raises(RunError, match="it is a symbolic link to another folder"):
        RunFolder(run).open(key)
    assert unchanged(outside)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_report_is_not_written_through_a_linked_folder_but_where_its_user_says(
    tmp_path: Path, outside: Path
):
    run = tmp_path / "run"
    write_run(run, 4, {})
    (run / "report").symlink_to(outside, target_is_directory=True)
    with pytest.raises(RunError, match=r"report cannot be written \(it is a symbolic link"):
        write_report(run)
    assert unchanged(outside)
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / "link").symlink_to(mine, target_is_directory=True)
    write_report(run, tmp_path / "link")
    assert (mine / "index.html").is_file()


def chosen(run: Path) -> None:
    select_into(run / "skiplist.json", RunFolder(run), "+10%")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "name"),
    [
        (chosen, "skiplist.json"),
        (chosen, "files.json"),
        (chosen, ".lock-files"),
        (write_report, "report/spikes.png"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_no_output_is_written_through_a_linked_file(
    tmp_path: Path, outside: Path, work: Callable[[Path], object], name: str
):
    run = tmp_path / "run"
    write_run(run, 4, {})
    (run / "report").mkdir()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "file")
    try:
        work(run)
    except QprobeError as error:
        assert f"{name} is damaged" in str(error) or "cannot be written" in str(error)
    else:
        assert not (run / name).is_symlink()
    assert unchanged(outside)


@pytest.mark.parametrize(
    "name", ["/etc/hosts", "../outside/file", "a/b.safetensors", "..\\b.safetensors", "scan.json", "", "C:b"]
)
def test_calibrated_weights_of_another_folder_are_neither_read_nor_copied(
    tmp_path: Path, outside: Path, name: str
):
    run = run_with(tmp_path / "run", 0, b"same")
    RunFolder(run).notes.put("codes", CodesFile(name, hashlib.sha256(b"precious").hexdigest()))
    with pytest.raises(RunError, match=r"no \.safetensors file of that folder"):
        join([run], tmp_path / "out")
    assert unchanged(outside) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", [".lock", ".lock-0", ".lock-selection"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, outside: Path, name: str, what: str):
    run = tmp_path / "run"
    run.mkdir()
    if what == "link":
        (run / name).symlink_to(outside / "file")
    elif what == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).mkdir()
    works: dict[str, Callable[[], Any]] = {
        ".lock": lambda: entered(run, Shard()),
        ".lock-0": lambda: entered(run, TWO),
        ".lock-selection": lambda: finishing(run, TWO, 0, "+10%"),
    }
    with pytest.raises(RunError, match="cannot be written"), works[name]():
        pass
    assert unchanged(outside)


def test_what_the_lock_of_the_selection_says_is_replaced_in_it(tmp_path: Path):
    (tmp_path / "skiplist.json").write_text("{}")
    for shard, request, turn in (
        (Shard(), "+10% and more", "ours"),
        (Shard(), "+10%", "ours"),  # alone: a user asks for it
        (TWO, "+10%", "chosen"),
        (TWO, "+5%", "ours"),
    ):
        with finishing(tmp_path, shard, 0, request) as found:
            assert found == turn


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "checkpoints/checkpoint-1"])
def test_a_fine_tuning_run_with_a_link_in_it_is_refused(tmp_path: Path, outside: Path, name: str):
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    write_record(out, Record("running", "f" * 64, {}))
    check_out(out, {})
    (out / name).symlink_to(outside)
    with pytest.raises(RunError, match=f"holds the symbolic link {name.rpartition('/')[2]}"):
        check_out(out, {})


def test_leftovers_are_removed_in_no_linked_folder(tmp_path: Path, outside: Path):
    left = outside / ".a.0123456789ab.tmp"
    left.write_bytes(b"half")
    run = make_run(tmp_path / "run")
    (run / "other").symlink_to(outside, target_is_directory=True)
    RunFolder(run).open(RunFolder(run).key)
    assert left.read_bytes() == b"half"
