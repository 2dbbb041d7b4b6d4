"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from qprobe.atomic import write_atomic, write_first


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
