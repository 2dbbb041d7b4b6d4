"""What a new skip-list takes the place of: set aside, unless a command makes it again; never another file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qprobe.errors import ManifestError, QprobeError, RunError
from qprobe.manifest.read import MAX_FILE_BYTES, read_manifest
from qprobe.manifest.records import Manifest, moved
from qprobe.manifest.write import write_manifest
from qprobe.runs.folder import RunFolder
from qprobe.selection.select import select
from qprobe.system.files import write_atomic
from qprobe.system.foreign import read_foreign

FILE = "skiplist.json"
_MEASURED, _OTHER = "measured", "before"  # how the copy of a list is called


@dataclass(frozen=True)
class Replaced:
    """The list that stood in the file before. kept_as: its copy; None where the command `again` makes it."""

    manifest: Manifest
    kept_as: Path | None
    again: str | None = None

    @property
    def sentence(self) -> str:
        """What was replaced, and where it is now."""
        made, kl = self.manifest.made_by.command, self.manifest.quality.kl_dynamic
        what = f"the list of `{made}`" + ("" if kl is None else f" (measured KL {kl:.3g})")
        if self.kept_as is None:
            return f"Replaces {what}; `{self.again}` makes it again."
        return f"Replaces {what}, which is kept as {self.kept_as}."


def select_into(
    target: Path, run: RunFolder, budget: str | None = None, **asked: Any
) -> tuple[Manifest, Replaced | None]:
    """(manifest that was written to `target`, what it took the place of).

    budget, asked: as of `qprobe.select`. Raises RunError unless a skip-list may be written there, and what
    `select` and `set_aside` raise; then `target` is as before.
    """
    check_target(run, target)
    manifest = moved(select(run, budget, **asked), run.path, target.parent)
    replaced = set_aside(run, target)
    write_manifest(target, manifest)
    if target.resolve() == (run.path / FILE).resolve():
        run.files.record(FILE, len(manifest.layers))
    return manifest, replaced


def check_target(run: RunFolder, target: Path) -> None:
    """Raises RunError unless a skip-list may be written to `target`: a new file, or a skip-list's.

    The copies that `set_aside` makes in `run` stay as they are, too.
    """
    if target.is_dir():
        raise RunError(f"{target} is a folder. Pass a file, such as {target / FILE}.")
    in_run = target.parent.resolve() == run.path.resolve()
    if in_run and target.suffix != ".json":  # also names that a report or a later scan will need
        raise RunError(
            f"{target} is no place for a skip-list: the run's own files lie there. Pass a .json name."
        )
    if not target.exists() or target.name == FILE:  # a broken list is what select makes again
        return
    is_copy = in_run and target.name == _copy(Path(FILE), _MEASURED).name
    if not is_copy and _manifest(target) is not None:
        return
    what = "the list that the scan measured" if is_copy else "something else than a skip-list"
    raise RunError(f"{target} holds {what}, and select would replace it. Pass another --out.")


def set_aside(run: RunFolder, target: Path) -> Replaced | None:
    """Copies the list in `target` beside it, before it is replaced, unless `select` on `run` makes it again.

    What a scan measured is copied to NAME-measured.json, other lists to NAME-before.json. None where
    `target` holds no manifest. Raises ManifestError if the copy cannot be written.
    """
    manifest = _manifest(target)
    if manifest is None:
        return None
    again = None if manifest.compared else _again(run, target, manifest)
    if again is not None:
        return Replaced(manifest, None, again)
    copy = _copy(target, _MEASURED if manifest.compared else _OTHER)
    try:
        write_atomic(copy, read_foreign(target, ManifestError, "Pass another --out.", MAX_FILE_BYTES))
    except OSError as error:
        raise ManifestError(
            f"{target} would be replaced, but its copy {copy} cannot be written ({error.strerror}). Pass "
            "another --out."
        ) from error
    return Replaced(manifest, copy)


def _copy(target: Path, name: str) -> Path:
    return target.with_name(f"{target.stem}-{name}{target.suffix}")


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except ManifestError:
        return None


def _again(run: RunFolder, target: Path, manifest: Manifest) -> str | None:
    """The command that makes `manifest` again from `run`; None if there is none, which is tried."""
    made_by = manifest.made_by.command
    words = shlex.split(made_by) if made_by.startswith("qprobe select ") else []
    asked = dict(zip(words[3::2], words[4::2], strict=False))
    if not words or not asked.keys() <= {"--budget", "--max-kl", "--by", "--for", "--experts"}:
        return None
    try:
        bound = float(asked["--max-kl"]) if "--max-kl" in asked else None
        made = select(
            run,
            asked.get("--budget"),
            by=asked.get("--by"),
            max_kl=bound,
            for_tool=asked.get("--for"),
            experts="16-bit" if "--experts" in asked else None,
        )
    except (QprobeError, ValueError):
        return None
    if moved(replace(made, made_by=manifest.made_by), run.path, target.parent) != manifest:
        return None
    out = [] if target == run.path / FILE else ["--out", str(target)]
    return shlex.join(["qprobe", "select", str(run.path), *words[3:], *out])
