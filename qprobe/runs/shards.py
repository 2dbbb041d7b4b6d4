"""Several processes on one scan: which units are whose, who may enter a folder, who finishes; no torch.

The variables are those that torchrun sets, and any scheduler can: RANK of WORLD_SIZE processes takes the
units `units[RANK::WORLD_SIZE]`, LOCAL_RANK says which GPU of its machine is its own. Processes never talk to
each other; all they share is the folder, or nothing, where folders are joined later. In one folder they wait
for each other's locks, which the system lets go of when a process ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

from qprobe.errors import RunError
from qprobe.runs.access import cannot_write, read_file
from qprobe.runs.folder import RunFolder
from qprobe.system.files import make_named_folder
from qprobe.system.locks import open_lock, try_lock, try_share, wait_for_lock
from qprobe.system.processes import Shard
from qprobe.system.wording import counted

SKIPLIST = "skiplist.json"
_LOCK = ".lock"
_SELECTION = f"{_LOCK}-selection"  # locked while somebody chooses; then it holds what was asked for
_LONGEST = 2**20  # bytes of what a lock file says

Turn = Literal["ours", "units left", "another's", "chosen"]
"""Who chooses: this process; whoever finishes the units that are left; another one right now; nobody more."""


@contextmanager
def entered(folder: Path, shard: Shard) -> Iterator[None]:
    """While open, no other scan works in `folder`, but the other ranks of this one may.

    The system lets go of the locks when a process ends, however it ends. Where a file system knows none, two
    scans in one folder cost time twice but harm nothing: every file is written whole, and the same by both.
    Raises RunError if another process holds the folder, or the folder cannot be made.
    """
    with ExitStack() as held:
        try:
            make_named_folder(folder)
            free = _lock(held, folder / _LOCK, try_lock if shard.is_alone else try_share)
            if free and not shard.is_alone:
                free = _lock(held, folder / f"{_LOCK}-{shard.rank}", try_lock)
        except OSError as error:
            raise cannot_write(folder, error) from error
        if not free:
            raise RunError(
                f"Another process is scanning into {folder}. Wait for it to end, or pass another --out; "
                "to share one scan, start its processes with torchrun."
            )
        yield


@contextmanager
def waiting(folder: Path, work: str) -> Iterator[None]:
    """While open, no other process is at this `work` in `folder`: waits until none is, or it has ended.

    Where a file system knows no locks nobody waits, and the same is done twice. Raises RunError if the folder
    cannot be written.
    """
    path = folder / f"{_LOCK}-{work}"
    with ExitStack() as held:
        try:
            wait_for_lock(held.enter_context(open_lock(path)))
        except OSError as error:
            raise cannot_write(path, error) from error
        yield


@contextmanager
def measuring(folder: Path, shard: Shard) -> Iterator[None]:
    """While open, `wait_for_units` of the other processes waits for this one. RunError as of `waiting`."""
    if shard.is_alone:
        yield
        return
    with waiting(folder, f"units-{shard.rank}"):
        yield


def wait_for_units(folder: Path, shard: Shard) -> None:
    """Comes back once no other process is `measuring` in `folder`; at once where the others work elsewhere.

    RunError as of `waiting`.
    """
    for rank in range(shard.world):
        if rank != shard.rank:
            with waiting(folder, f"units-{rank}"):
                pass


def is_chosen(folder: Path, request: str) -> bool:
    """True if the list that `request` asks for lies in `folder` already."""
    met = _met(folder, request)
    return met is not None and read_file(folder / _SELECTION) == met


@contextmanager
def finishing(folder: Path, shard: Shard, left: int, request: str) -> Iterator[Turn]:
    """Whether this process goes on to choose the list that `request` asks for, which only one of all may.

    Each process counts what is `left` after it wrote its last unit, so the last one counts none. A process
    that comes when the same request was met already does not choose again, unless it is alone: then a user
    started it for that. A request counts as met once the block has ended without an error.
    Raises RunError if the folder cannot be written.
    """
    if left:
        yield "units left"
        return
    path = folder / _SELECTION
    with ExitStack() as held:
        try:
            file = held.enter_context(open_lock(path))
            if try_lock(file) is False:
                turn: Turn = "another's"
            elif not shard.is_alone and file.read(_LONGEST) == _met(folder, request):
                turn = "chosen"
            else:
                turn = "ours"
                _rewrite(file, b"")
        except OSError as error:
            raise cannot_write(path, error) from error
        yield turn
        if turn == "ours":
            with suppress(OSError):  # a full disk: a late process then chooses the same again
                _rewrite(file, _met(folder, request) or b"")


def _met(folder: Path, request: str) -> bytes | None:
    """That the skip-list which lies in `folder` is the one chosen for `request`; None if there is none."""
    data = read_file(folder / SKIPLIST)
    return None if data is None else f"{request}\n{hashlib.sha256(data).hexdigest()}\n".encode()


def _rewrite(file: BinaryIO, data: bytes) -> None:
    """Puts `data` into an open file, in the place of what it held; through its name it could be another."""
    file.seek(0)
    file.truncate()
    file.write(data)
    file.flush()


def _lock(held: ExitStack, path: Path, how: Callable[[BinaryIO], bool | None]) -> bool:
    """False if another process has the file locked; `held` lets go of it."""
    return how(held.enter_context(open_lock(path))) is not False


def left_to_others(shard: Shard, turn: Turn, run: RunFolder) -> str:
    """The verdict of a process that does not choose."""
    if turn == "chosen":
        rest = f"the list is chosen already: {run.path / SKIPLIST}. To choose again, run the command alone."
    elif turn == "another's":
        rest = "another one chooses the list."
    else:
        left = run.units_left
        rest = (
            f"{counted(left, 'unit')} {'is' if left == 1 else 'are'} left to the others, and the last of "
            "them chooses the list. Where they have folders of their own, join these with `qprobe join`."
        )
    return f"Rank {shard.rank} of {shard.world} is done with its share; {rest}"
