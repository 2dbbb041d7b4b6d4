"""finetune.json: what a folder's fine-tuning run was asked for, how far it came, and what it found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qprobe.errors import RunError
from qprobe.system.decoding import decode, strict_json
from qprobe.system.files import make_named_folder, write_atomic
from qprobe.system.foreign import read_foreign_if_there

RECORD = "finetune.json"
MAX_RECORD_BYTES = 256 * 2**20  # its loss curves have about 40 bytes per step


@dataclass(frozen=True)
class Distilled:
    """What distilling gave. before, after: KL on the lines kept back, nats per answer token, at the start and
    at the best step; steps: the number of that, 0 where none was found to be better than the start.
    """

    steps: int
    before: float
    after: float


@dataclass(frozen=True)
class Record:
    """One run. spec: what decides the adapter, JSON values; result: of `finetune --json`, of a finished one.

    model: the folder of the 16-bit weights; None for a model that the manifest names so that it is found.
    processes: that it began with, so that steps keep their lines when another number of them goes on.
    distilled: what it began with; None where nothing was distilled.
    status: "diverged" where the loss became no number, so that there is nothing to go on from.
    """

    status: Literal["running", "diverged", "finished"]
    fingerprint: str
    spec: Mapping[str, Any]
    result: dict[str, Any] | None = None
    model: str | None = None
    processes: int = 1
    distilled: Distilled | None = None


def read_record(folder: Path) -> Record | None:
    """What finetune.json in `folder` holds; None if there is none. Raises RunError if it is broken."""
    path = folder / RECORD
    fix = "Remove the folder and train again."
    data = read_foreign_if_there(path, RunError, fix, MAX_RECORD_BYTES)
    if data is None:
        return None
    try:
        return decode(Record, strict_json(data), "the record")
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}). {fix}") from None


def write_record(folder: Path, record: Record) -> None:
    """Write finetune.json whole or not at all; raises RunError if the folder cannot be written."""
    try:
        make_named_folder(folder)
        write_atomic(folder / RECORD, (json.dumps(asdict(record), indent=2) + "\n").encode())
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}). Pass another folder.") from error
