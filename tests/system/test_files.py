"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from qprobe.system import files as atomic
from qprobe.system.files import atomic_file, make_named_folder, remove_left_behind, write_atomic, write_first


def test_the_last_writer_of_a_file_wins_and_leaves_nothing_else(tmp_path: Path):
    for data in (b"one", b"two"):
        write_atomic(tmp_path / "file", data)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"two"}


def test_the_first_writer_of_a_shared_file_decides_it(tmp_path: Path):
    assert write_first(tmp_path / "file", b"one")
    assert not write_first(tmp_path / "file", b"two")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"one"}


def test_where_links_are_unknown_the_file_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refused)
    assert write_first(tmp_path / "file", b"one") and (tmp_path / "file").read_bytes() == b"one"


def test_what_killed_writers_left_is_removed_and_what_is_being_written_stays(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    left = [tmp_path / ".a.0123456789ab.tmp", tmp_path / "sub" / ".b.csv.0123456789ab.tmp"]
    others = [tmp_path / ".notes.tmp", tmp_path / "a.0123456789ab.tmp", tmp_path / ".a.0123456789AB.tmp"]
    for path in (*left, *others):
        path.write_bytes(b"half")
    with atomic_file(tmp_path / "sub" / "busy") as file:
        file.write(b"whole")
        remove_left_behind(tmp_path)
        assert not any(path.exists() for path in left) and all(path.exists() for path in others)
    assert (tmp_path / "sub" / "busy").read_bytes() == b"whole"


def test_a_file_removed_before_it_was_locked_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, left = atomic.try_lock, [True, True]

    def late(file: Any) -> bool | None:
        # The other process had it, and removes it: first it still does so, then it has done so.
        if left:
            left.pop()
            os.unlink(file.name)
            return real(file) if left else False
        return real(file)

    monkeypatch.setattr(atomic, "try_lock", late)
    write_atomic(tmp_path / "file", b"data")
    assert not left and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"data"}


def test_where_locks_are_unknown_age_tells_who_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refused)
    old, young = (tmp_path / f".a.{name * 12}.tmp" for name in "0f")
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    with atomic_file(tmp_path / "busy") as file:
        remove_left_behind(tmp_path)
        file.write(b"whole")
    assert {p.name for p in tmp_path.iterdir()} == {young.name, "busy"}


def test_a_file_that_gets_its_name_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / ".unit.0123456789ab.tmp"
    path.write_bytes(b"whole")
    is_file = Path.is_file

    def renamed_next(asked: Path, **more: Any) -> bool:
        found = is_file(asked, **more)
        asked.rename(tmp_path / "unit")
        return found

    monkeypatch.setattr(Path, "is_file", renamed_next)
    remove_left_behind(tmp_path)
    assert (tmp_path / "unit").read_bytes() == b"whole"


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, below: str):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(OSError) as caught:
        make_named_folder(tmp_path / "rows.jsonl" / below)
    assert caught.value.strerror == f"{tmp_path / 'rows.jsonl'} is no folder"
