"""One fine-tuning run a folder at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qprobe.errors import RunError
from qprobe.system.files import remove_left_behind
from qprobe.system.foreign import read_foreign_if_there
from qprobe.system.locks import held_alone

LOCK = ".lock"
MAX_STATE_BYTES = 2**30  # it has a few hundred bytes per logged step


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While open, no other process trains into `folder`; a folder that is empty afterwards, also
    after an error, is removed.

    The system lets go of the lock when a process ends, however it ends; temporary files that killed ones left
    go before. Raises RunError if another process holds it, or the folder cannot be made.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_held = stack.enter_context(held_alone(folder / LOCK))
            if is_held:
                remove_left_behind(folder)
        except OSError as error:
            raise RunError(f"{folder} cannot be written ({error.strerror}). Pass another folder.") from error
        if not is_held:
            raise RunError(
                f"Another process is training into {folder}. Wait for it to end, or pass another --out."
            )
        try:
            yield
        finally:
            if {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; what a killed run left half written is removed.

    The Trainer writes the state last, so a checkpoint with a readable state is whole.
    """
    whole: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        try:
            state = read_foreign_if_there(path / "trainer_state.json", RunError, "", MAX_STATE_BYTES)
            json.loads((state or b"").decode("utf-8"))
            whole[int(path.name.rpartition("-")[2])] = path
        except (RunError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return whole[max(whole)] if whole else None
