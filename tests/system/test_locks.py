"""Locks: one process alone, or several together; without fcntl the package is still there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qprobe.system.locks import open_lock, try_lock, try_share, wait_for_lock

ROOT = Path(__file__).parents[2]


def test_one_holds_a_lock_alone_and_several_share_one(tmp_path: Path):
    path = tmp_path / "lock"
    with open_lock(path) as one, open_lock(path) as other:
        assert try_lock(one)
        assert try_lock(other) is False and try_share(other) is False
    with open_lock(path) as one, open_lock(path) as other, open_lock(path) as third:
        assert try_share(one) and try_share(other)
        assert try_lock(third) is False


@pytest.mark.slow
def test_a_lock_that_ends_lets_the_next_one_wait_no_more(tmp_path: Path):
    path = tmp_path / "lock"
    with open_lock(path) as one:
        assert try_lock(one)
        code = (
            "import sys; from pathlib import Path; from qprobe.system.locks import open_lock, wait_for_lock\n"
            f"file = open_lock(Path({str(path)!r})); print('waits', flush=True)\n"
            "wait_for_lock(file); print('has it')"
        )
        waiting = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert waiting.stdout is not None and waiting.stdout.readline() == "waits\n"
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.3)
    assert waiting.communicate(timeout=300)[0] == "has it\n"


def test_a_lock_file_holds_what_it_held(tmp_path: Path):
    (tmp_path / "lock").write_bytes(b"data")
    with open_lock(tmp_path / "lock") as file:
        assert try_lock(file) and file.read() == b"data"


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError) as caught:
        open_lock(tmp_path / "lock")
    assert caught.value.errno == errno.ELOOP and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_from_a_lock_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    def none_here(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", none_here)
    with open_lock(tmp_path / "lock") as file:
        assert try_lock(file) is None and try_share(file) is None
        wait_for_lock(file)


def test_another_error_of_a_lock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", broken)
    with open_lock(tmp_path / "lock") as file:
        for how in (try_lock, try_share, wait_for_lock):
            with pytest.raises(OSError, match="Input/output"):
                how(file)


def run_without_fcntl(code: str) -> str:
    program = f"import sys; sys.modules['fcntl'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_is_imported_without_fcntl():
    code = "import qprobe, sys; print('fcntl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.slow
def test_every_room_without_torch_is_imported_where_there_is_no_fcntl():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rooms = next(x["source_modules"] for x in contracts if x["name"] == "Rooms without torch")
    code = (
        "import importlib, pkgutil\n"
        f"for room in {['qprobe', 'qprobe.cli', *rooms]!r}:\n"
        "    module = importlib.import_module(room)\n"
        "    for found in pkgutil.walk_packages(getattr(module, '__path__', []), room + '.'):\n"
        "        if room != 'qprobe':\n"
        "            importlib.import_module(found.name)\n"
        "print('all of', len([x for x in sys.modules if x.startswith('qprobe')]) > 50)"
    )
    assert run_without_fcntl(code) == "all of True\n"


def test_files_are_written_whole_where_there_is_no_fcntl(tmp_path: Path):
    code = (
        "from pathlib import Path; from qprobe.system.files import remove_left_behind, write_atomic\n"
        "from qprobe.system.locks import open_lock, try_lock, try_share\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "write_atomic(folder / 'file', b'data'); remove_left_behind(folder)\n"
        "file = open_lock(folder / 'lock'); print(try_lock(file), try_share(file))"
    )
    assert run_without_fcntl(code) == "None None\n"
    assert (tmp_path / "file").read_bytes() == b"data"
