"""What was derived from the units, and whether it is whole: RUN/files.json; no torch.

One object per derived file by its name: rows (of a table, or of what else it lists) and sha256. A unit file
shows by itself that it was cut, a CSV file does not. The report's pictures and page are not among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qprobe.errors import RunError
from qprobe.runs.access import cannot_write, one_at_a_time, read_file, write_file
from qprobe.system.decoding import FORMULAS, decode, strict_json
from qprobe.system.wording import shortened

FILE = "files.json"
_LOCK = ".lock-files"
_FIX = "Run the scan again, which makes it again from its units."
_FIXES = {"compare.json": "Run `qprobe compare` again, or delete it."}


@dataclass(frozen=True)
class Derived:
    """A derived file as it was written."""

    rows: int
    sha256: str

    @classmethod
    def of(cls, data: bytes, rows: int) -> Derived:
        """The file that holds `data`."""
        return cls(rows, _sha256(data))


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """`frame` as a CSV file, numbers with the fewest digits that read back as the same number.

    A text that a spreadsheet would compute, as a sample's id may be, gets an apostrophe in front.
    """
    texts = {
        str(name): column.map(_inert) for name, column in frame.items() if column.dtype.kind not in "iufb"
    }
    return frame.assign(**texts).to_csv(index=False, lineterminator="\n").encode()


def _inert(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULAS) else cell


class DerivedFiles:
    """The derived files of the run in `folder`; each is read once, and held against files.json then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, bytes] = {}
        self._known: dict[str, Derived] | None = None

    def has(self, name: str) -> bool:
        """Whether the file `name` is there."""
        return (self.folder / name).is_file()

    def read(self, name: str) -> bytes | None:
        """The bytes of the file `name`, None if there is none; RunError if it is cut or cannot be read."""
        if name not in self._read:
            data = read_file(self.folder / name)
            if data is None:
                return None
            _check_whole(self.folder / name, data, self._listed().get(name))
            self._read[name] = data
        return self._read[name]

    def is_whole(self, name: str) -> bool:
        """Whether the file `name` is there as it was written, by files.json.

        False for one that it does not list: its writer was killed in between, or another program wrote it.
        """
        try:
            return name in self._listed() and self.read(name) is not None
        except RunError:
            return False

    def lost(self, names: Iterable[str]) -> dict[str, Derived | None]:
        """Those of `names` that are not as they were written, with what files.json says; or are gone.

        Where files.json is damaged nobody can tell: all that are there, with None.
        """
        try:
            listed = self._listed()
        except RunError:
            return {name: None for name in names if self.has(name)}
        return {name: listed[name] for name in names if name in listed and not self.is_whole(name)}

    def write(self, files: Mapping[str, tuple[bytes, int]]) -> None:
        """Write files, (bytes, rows) by name, and put them into files.json."""
        with self._noting() as known:
            changed = [
                name
                for name, (data, _) in files.items()
                if name in known and _sha256(data) != known[name].sha256
            ]
            if changed:  # until the new ones are there, nothing is known of them
                for name in changed:
                    del known[name]
                self._write(known)
            for name, (data, rows) in files.items():
                write_file(self.folder / name, data)
                known[name] = Derived.of(data, rows)
                self._read.pop(name, None)

    def record(self, name: str, rows: int) -> None:
        """Put the file `name`, which was just written by other means, into files.json."""
        with self._noting() as known:
            data = read_file(self.folder / name)
            assert data is not None, name
            known[name] = Derived.of(data, rows)
            self._read.pop(name, None)

    def remove(self, name: str) -> None:
        """Remove the file `name`, if it is there."""
        with self._noting() as known:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(self.folder / name, error) from error
            known.pop(name, None)
            self._read.pop(name, None)

    def _listed(self) -> dict[str, Derived]:
        """What files.json says."""
        if self._known is None:
            path = self.folder / FILE
            data = read_file(path)
            try:
                known = {} if data is None else decode(dict[str, Derived], strict_json(data), "files")
            except ValueError as error:
                raise RunError(
                    f"{path} is damaged ({shortened(str(error), 100)}). Delete it, or run the scan again, "
                    "which writes it again."
                ) from None
            self._known = known
        return self._known

    @contextmanager
    def _noting(self) -> Iterator[dict[str, Derived]]:
        """What files.json says, to be changed; it is written at the end, while no other process does so."""
        with one_at_a_time(self.folder, _LOCK):
            self._known = None
            try:
                known = dict(self._listed())
            except RunError:  # damaged: what is written from now on is known again
                known = {}
            before = dict(known)
            yield known
            if known != before or not self.has(FILE):
                self._write(known)

    def _write(self, known: Mapping[str, Derived]) -> None:
        listed = {name: asdict(known[name]) for name in sorted(known)}
        write_file(self.folder / FILE, (json.dumps(listed, indent=1) + "\n").encode())
        self._known = dict(known)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_whole(path: Path, data: bytes, known: Derived | None) -> None:
    """Raises RunError if `data`, what the file `path` holds, is not what was written.

    known: what files.json says; None where it says nothing, as of a file that qprobe did not write.
    """
    if known is None or _sha256(data) == known.sha256:
        return
    rows = max(data.count(b"\n") - 1, 0)
    is_cut = path.suffix == ".csv" and rows < known.rows
    why = f"it is cut: {rows} of {known.rows} rows are left" if is_cut else "it is not as it was written"
    raise RunError(f"{path} is damaged ({why}). {_FIXES.get(path.name, _FIX)}")
