"""One fine-tuning run a folder at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qprobe.checkpoint.adapters.record import Record, read_record, write_record
from qprobe.errors import RunError
from qprobe.system.files import make_named_folder, remove_left_behind
from qprobe.system.foreign import read_foreign_if_there
from qprobe.system.locks import held_alone

LOCK = ".lock"
CHECKPOINTS = "checkpoints"
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
            make_named_folder(folder)
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


def check_out(out: Path, spec: Mapping[str, Any]) -> None:
    """Raises RunError unless `out` is new, empty, a run that has nothing to lose, or an unfinished one with
    the same spec.
    """
    if not out.exists() or (out.is_dir() and all(x.name == LOCK for x in out.iterdir())):
        return
    record = read_record(out) if out.is_dir() else None
    if record is None:
        raise RunError(f"{out} is there already and holds no run of qprobe finetune. Pass another folder.")
    if record.status == "finished":
        raise RunError(f"{out} holds a finished adapter. Pass another folder, or remove it to train again.")
    links = sorted(x.name for x in (*out.iterdir(), *(out / CHECKPOINTS).rglob("*")) if x.is_symlink())
    if links:  # the libraries that write here would follow it
        raise RunError(f"{out} holds the symbolic link {links[0]}, which would lead out of it. Remove it.")
    differing = sorted(key for key in spec if record.spec.get(key) != spec[key])
    if differing and record.status != "diverged" and last_checkpoint(out / CHECKPOINTS) is not None:
        raise RunError(
            f"{out} holds an unfinished run that was asked for otherwise ({', '.join(differing)}). Pass the "
            f"same options to continue it, or another folder."
        )


def goes_on(out: Path, spec: Mapping[str, Any]) -> bool:
    """True if a run with `spec` goes on from a checkpoint in `out`; of one that diverged nothing is."""
    before = read_record(out)
    if before is None or before.status == "diverged" or before.spec != spec:
        return False
    return last_checkpoint(out / CHECKPOINTS) is not None


def start_record(out: Path, begun: Record) -> Record:
    """Writes and gives the record of a run that begins or goes on in `out`. One that goes on keeps what it
    began with, the number of processes and what was distilled; of another the checkpoints are removed.
    """
    before, record = read_record(out), begun
    if before is not None and goes_on(out, begun.spec):
        record = replace(begun, processes=before.processes, distilled=before.distilled)
    else:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    write_record(out, record)
    return record
