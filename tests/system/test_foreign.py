"""Files that somebody else wrote: read whole and within limits, or refused in one sentence."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qprobe.errors import RunError
from qprobe.system.foreign import check_foreign, open_foreign, read_foreign, read_foreign_if_there

FIX = "Put it back."


def read(path: Path, limit: int = 100) -> bytes:
    return read_foreign(path, RunError, FIX, limit)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_regular_file_up_to_the_limit_is_read_whole(tmp_path: Path, size: int):
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    assert read(path) == b"x" * size
    with open_foreign(path, RunError, FIX, None) as file:
        assert file.read() == b"x" * size


@pytest.mark.parametrize(("limit", "said"), [(100, "100 bytes"), (2**20, "1 MiB"), (3 * 2**30, "3,072 MiB")])
def test_a_file_beyond_the_limit_is_refused(tmp_path: Path, limit: int, said: str):
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.truncate(limit + 1)
    for how in (read_foreign, open_foreign, check_foreign, read_foreign_if_there):
        with pytest.raises(RunError) as caught:
            how(path, RunError, FIX, limit)
        assert str(caught.value) == f"{path} cannot be read (it is larger than {said}). {FIX}"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_a_file_that_hides_its_size_is_refused_all_the_same():
    path = Path("/proc/self/status")
    assert path.stat().st_size == 0
    with pytest.raises(RunError, match="larger than 10 bytes"):
        read(path, 10)


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def bound(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
    return path


def linked_pipe(path: Path) -> Path:
    path.symlink_to(pipe(path.with_name("pipe")))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (pipe, "it is a pipe"),
        (linked_pipe, "it is a pipe"),
        (folder, "it is a folder"),
        (bound, "it is a socket"),
        (lambda _: Path("/dev/zero"), "it is a device"),
        (lambda path: path / "\0", "it is no name of a file"),
        (lambda path: path / "\ud800", "it is no name of a file"),
        (lambda path: path.with_name("x" * 300), "File name too long"),
    ],
)
def test_what_is_no_regular_file_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], said: str
):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    path = make(Path("it"))

    def opened(*_: object) -> int:
        raise AssertionError("opened")

    monkeypatch.setattr(os, "open", opened)
    for how in (read_foreign, open_foreign, check_foreign, read_foreign_if_there):
        with pytest.raises(RunError) as caught:
            how(path, RunError, FIX, 100)
        assert str(caught.value) == f"{path} cannot be read ({said}). {FIX}"


def test_a_file_that_is_exchanged_for_a_pipe_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "file"
    path.write_bytes(b"data")
    real = os.open

    def exchanged(*arguments: object) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(os, "open", exchanged)
    with pytest.raises(RunError, match="it is a pipe"):
        read(path)


def test_a_link_to_a_regular_file_is_followed(tmp_path: Path):
    (tmp_path / "blob").write_bytes(b"data")
    (tmp_path / "file").symlink_to("blob")
    assert read(tmp_path / "file") == b"data"


@pytest.mark.parametrize("name", ["none", "none/file", "file/below"])
def test_what_is_not_there_is_said_or_none(tmp_path: Path, name: str):
    (tmp_path / "file").write_bytes(b"")
    assert read_foreign_if_there(tmp_path / name, RunError, FIX, 100) is None
    with pytest.raises(RunError, match=rf"{name} cannot be read \((No such file|Not a) .*\)\. {FIX}"):
        read(tmp_path / name)
