"""The new folder of a checkpoint: refused before anything is loaded, and whole once it has its name."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from qprobe.errors import ManifestError, ModelError, QprobeError, RunError, is_out_of_memory
from qprobe.system.files import make_named_folder
from qprobe.system.locks import held_alone, try_lock


def refuse_to_overwrite(target: Path) -> None:
    """Raises ModelError unless `target` is missing or an empty folder, which a new one can replace."""
    if target.is_symlink():
        raise ModelError(
            f"{target} is a symbolic link, and the checkpoint takes its place as a folder. Pass the folder "
            "that it leads to, or one that is new."
        )
    if not target.name:
        raise ModelError(f"{target} names no folder that can be made. Pass one that is new.")
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target} is a file, and the checkpoint is a folder. Pass a folder that is new.")
    if target.exists() and any(target.iterdir()):
        raise ModelError(f"{target} is there already and not empty. Pass another folder, or remove it first.")


@contextmanager
def alone_at(target: Path) -> Iterator[None]:
    """While open, no other process writes the new folder `target`; beside it lies a lock, `.NAME.lock`.

    Raises ModelError if another one does, or the lock cannot be made.
    """
    with ExitStack() as stack:
        try:
            make_named_folder(target.parent)
            is_held = stack.enter_context(held_alone(target.with_name(f".{target.name}.lock")))
        except OSError as error:
            reason = error.strerror or error
            raise ModelError(
                f"{target} cannot be written ({reason}). Make room, or pass another folder."
            ) from error
        if not is_held:
            raise ModelError(
                f"Another process is writing {target}. Wait for it to end, or pass another folder."
            )
        yield


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends without an error.

    What is left after an error, and the errors, as of `scratch_folder`.
    """
    with scratch_folder(target) as folder:
        yield folder
        os.replace(folder, target)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that is gone when the block ends, if it was not renamed.

    What killed processes left of earlier ones goes before. Raises ModelError if it or a file in it cannot be
    written, or it cannot be renamed because `target` got files meanwhile.
    """
    folder = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        _remove_stale(target)
        folder.mkdir(parents=True)
        with _locked(folder):
            yield folder
    except (OSError, SafetensorError, ManifestError, RunError) as error:  # of a shard's full disk the second
        cause = error.__cause__ if isinstance(error, QprobeError) else error
        if not isinstance(cause, OSError | SafetensorError) or is_out_of_memory(cause):
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise ModelError(
            f"{target} cannot be written ({reason}). Make room, or pass another folder."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Removes temporary folders of `target` that no living process holds; where locks are unknown, none."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.tmp")
    there = target.parent.iterdir() if target.parent.is_dir() else ()
    for folder in [x for x in there if pattern.fullmatch(x.name) and x.is_dir() and not x.is_symlink()]:
        with _locked(folder) as is_free:
            if is_free:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of `folder`, which the system lets go of when a process ends; False if it cannot."""
    place = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    is_held = None
    with suppress(OSError):  # a folder cannot be opened for writing, which some file systems ask for
        is_held = try_lock(place)
    try:
        yield bool(is_held)
    finally:
        os.close(place)
