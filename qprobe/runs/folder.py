"""A run folder as one object that reads each of its files once; no torch.

RUN/scan.json     the key: everything that decides a number        `qprobe.runs.key`
RUN/notes/        what processes remarked on the way               `qprobe.runs.notes`
RUN/units/        the finished units                               `qprobe.runs.units`
RUN/layers.csv    and others, derived from the units               `qprobe.runs.layers`, `qprobe.runs.shown`
RUN/files.json    row count and SHA-256 of what was derived        `qprobe.runs.derived`
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa

from qprobe.errors import RunError
from qprobe.records import CodesFile, Inventory, Scan
from qprobe.registry.measures import CALIBRATION
from qprobe.runs.access import cannot_write, read_file, write_file
from qprobe.runs.derived import FILE as DERIVED
from qprobe.runs.derived import DerivedFiles
from qprobe.runs.key import ANSWERS as OF_ANSWERS
from qprobe.runs.key import FILE as KEY_FILE
from qprobe.runs.key import Key, differences, key_bytes, parse_key
from qprobe.runs.layers.ranks import FILE as RANKS
from qprobe.runs.layers.ranks import parse_ranks
from qprobe.runs.layers.table import FILE as TABLE
from qprobe.runs.layers.table import derived_table, parse_table
from qprobe.runs.notes import FOLDER as NOTES
from qprobe.runs.notes import Notes
from qprobe.runs.shown import FILE as SAMPLES
from qprobe.runs.shown import ShownSample, parse_shown
from qprobe.runs.units import UNIT_BYTES, decode_unit, encode_unit, number_of, rows_of, stage_of, unit_name
from qprobe.system.files import make_folder, remove_left_behind, write_first
from qprobe.system.foreign import is_plain_name
from qprobe.system.wording import shortened

_CODES = ".safetensors"
_DERIVED = (TABLE, RANKS, SAMPLES, DERIVED, "skiplist.json", "peaks.csv", "frontier.csv", "experts.csv")
ANSWERS = "answers"
"""The folder of generated answers in a run folder, one file for each batch."""


class RunFolder:
    """The run in the folder `path`, which need not exist yet.

    What was read is kept, and writing through this object keeps its view right. Other processes may add units
    and notes meanwhile: new units are found, and notes are read when they are first asked for. Nobody may
    change the values that it gives.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.notes = Notes(self.path)
        self.files = DerivedFiles(self.path)
        self._key: Key | None = None
        self._units: dict[str, pa.Table] = {}
        self._frames: dict[str, tuple[list[str], pd.DataFrame]] = {}
        self._parsed: dict[str, tuple[bytes, Any]] = {}

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    # The key ------------------------------------------------------------------------------------------------

    @property
    def is_there(self) -> bool:
        """Whether the folder belongs to a scan already."""
        return (self.path / KEY_FILE).is_file()

    @property
    def key(self) -> Key:
        """What decides every number; RunError if scan.json is missing, damaged or of another version."""
        if self._key is None:
            data = read_file(self.path / KEY_FILE)
            if data is None:
                what = "has no scan.json" if self.path.is_dir() else "is a file"
                why = what if self.path.exists() else "does not exist"
                raise RunError(f"{self.path} is no run folder: it {why}. Pass the folder of a scan.")
            self._key = parse_key(self.path / KEY_FILE, data)
        return self._key

    def open(self, asked: Key) -> None:
        """Make the folder ready for the units of `asked`; if it holds that scan already, it is resumed.

        Of several processes that open it at once with different keys, one gets the folder.
        Raises RunError if the folder belongs to another scan (every difference is named, old -> new), holds
        units of an unknown one or files of the user's that a scan would replace, is damaged, or cannot be
        written.
        """
        path, units = self.path / KEY_FILE, self.path / "units"
        foreign = [name for name in _DERIVED if not path.exists() and os.path.lexists(self.path / name)]
        # Looked for once more, as another process may have begun between.
        if foreign and not any(units.glob("*.parquet")) and not path.exists():
            raise RunError(
                f"{self.path} is no run folder: it has no scan.json, and a scan would replace "
                f"{', '.join(foreign)} there. Pass another --out."
            )
        try:
            make_folder(units)
            make_folder(self.path / NOTES)
            remove_left_behind(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if not path.exists():
            if any(units.glob("*.parquet")) and not path.exists():
                raise RunError(
                    f"{self.path} holds finished units but no scan.json, so nobody can tell which scan they "
                    "belong to. Pass another --out, or put its scan.json back."
                )
            write_file(path, key_bytes(asked), write_first)
            self._key = None  # another process may have been first
        self.check_same(asked)

    def check_same(self, asked: Key) -> None:
        """Raises RunError if the folder belongs to another scan than `asked`."""
        found = differences(self.key, asked)
        if found:
            raise RunError(f"{self.path} holds another scan, which differs in {found}. Pass another --out.")

    # What is known of the scan ------------------------------------------------------------------------------

    @property
    def codes(self) -> CodesFile | None:
        """The calibrated weights, beside scan.json; None before they are there, and for formats without.

        Raises RunError if the notes name a file that lies elsewhere, or can be none of weights.
        """
        codes: CodesFile | None = self.notes.get("codes")
        if codes is not None and not (is_plain_name(codes.file) and codes.file.endswith(_CODES)):
            raise RunError(
                f"The notes of {self.path} name {shortened(repr(codes.file), 80)} as the file of calibrated "
                f"weights, which is no {_CODES} file of that folder. Put its notes/codes.json back."
            )
        return codes

    @property
    def has_unknown_codes(self) -> bool:
        """True if there are measurements of calibrated weights, but nobody can tell of which."""
        measured = (name for name in self.unit_files() if stage_of(name) != CALIBRATION.name)
        return self.key.format.is_calibrated and self.codes is None and any(measured)

    @property
    def inventory(self) -> Inventory:
        """Every linear in execution order: that of layers.csv, or of the units where it is not there yet."""
        return (
            self._ordered(self.table["layer"].tolist()) if self.files.has(TABLE) else self.measured_inventory
        )

    @property
    def measured_inventory(self) -> Inventory:
        """Every linear in the order in which they ran, by the units; those that never ran come last."""
        return self._ordered(self.units("outputs")["layer"].unique().tolist())

    def _ordered(self, names: list[str]) -> Inventory:
        place = {name: i for i, name in enumerate(names)}
        layers = sorted(self.key.inventory.layers, key=lambda x: place.get(x.name, len(place)))
        return replace(self.key.inventory, layers=tuple(layers))

    @property
    def scan(self) -> Scan:
        """What is known of the scan: its key but for the specification, and what was noted."""
        ran, end = self.notes.get("layers"), self.notes.get("end")
        return Scan(
            model=self.key.model,
            format=self.key.format,
            inventory=self.inventory,
            status="running" if end is None else "finished",
            unmeasured=ran.unmeasured if ran else (),
            notes=self.notes.sentences,
            seconds=end.seconds if end else {},
            peak_bytes=end.peak_bytes if end else None,
            codes=self.codes,
            readout=self.key.spec.measures.readout if self.key.spec.measures else OF_ANSWERS,
        )

    # Units --------------------------------------------------------------------------------------------------

    def units(self, stage: str) -> pd.DataFrame:
        """All finished units of `stage` in unit order, see `rows_of`; RunError if a file is damaged."""
        found = (path.name for path in (self.path / "units").glob(f"{stage}-*.parquet"))
        names = sorted((name for name in found if stage_of(name) == stage), key=number_of)
        known = self._frames.get(stage)
        if known is None or known[0] != names:
            known = names, rows_of(self.path, stage, [self.unit(name) for name in names])
            self._frames[stage] = known
        return known[1]

    def unit(self, name: str) -> pa.Table:
        """The table in the unit file `name`.

        Raises DamagedUnitError or RunError as `decode_unit` does, RunError also if it cannot be read.
        """
        if name not in self._units:
            self.load_unit(name)
        return self._units[name]

    def load_unit(self, name: str) -> bytes:
        """The bytes of the unit file `name`, of which only the rows are kept; errors as of `unit`."""
        path = self.path / "units" / name
        data = read_file(path, UNIT_BYTES)
        if data is None:
            raise RunError(f"{path} is gone although it was there a moment ago. Run the same command again.")
        self._units[name] = decode_unit(path, data)
        return data

    def unit_files(self) -> list[str]:
        """The names of all finished units of known stages, in alphabetical order."""
        found = sorted(path.name for path in (self.path / "units").glob("*.parquet"))
        return [name for name in found if stage_of(name) is not None]

    def missing_units(self, stage: str, count: int) -> list[int]:
        """The numbers in 0 .. count - 1 whose unit of `stage` is not finished, ascending."""
        return [n for n in range(count) if not (self.path / "units" / unit_name(stage, n)).exists()]

    @property
    def units_left(self) -> int:
        """How many units of the layer table no process has finished yet."""
        needed = self.key.spec.needed_units
        return sum(len(self.missing_units(stage, count)) for stage, count in needed.items())

    def write_unit(self, stage: str, unit: int, frame: pd.DataFrame) -> None:
        """Write `frame`, as of `encode_unit`, as the finished unit number `unit`, replacing an earlier one.

        Raises RunError if the disk refuses.
        """
        self.put_unit(unit_name(stage, unit), *encode_unit(stage, frame))

    def put_unit(self, name: str, data: bytes, rows: pa.Table) -> None:
        """Write `data`, which holds `rows`, as the unit file `name`; RunError if the disk refuses."""
        write_file(self.path / "units" / name, data)
        self._forget_unit(name)
        self._units[name] = rows

    def set_aside(self, name: str, new_name: str) -> None:
        """Rename the file `name` of the units, if it is still there; raises OSError."""
        with suppress(FileNotFoundError):
            os.replace(self.path / "units" / name, self.path / "units" / new_name)
        self._forget_unit(name)

    def _forget_unit(self, name: str) -> None:
        self._units.pop(name, None)
        self._frames.pop(stage_of(name) or "", None)

    # What was derived ---------------------------------------------------------------------------------------

    @property
    def table(self) -> pd.DataFrame:
        """The layer table in layers.csv, equal to what `derived_table` gave when it was written.

        Raises RunError if the file is missing, cut or damaged, or its layers are not those of scan.json.
        """
        table = self._once(TABLE, lambda path, data: parse_table(path, data, self.key.inventory))
        if table is None:
            _ = self.key  # a path that is no run folder is told from a scan that has not finished
            raise RunError(f"{self.path} has no layers.csv: its scan has not finished. Run the scan again.")
        return table

    @property
    def table_so_far(self) -> pd.DataFrame:
        """The layer table; from the units that there are where layers.csv is not written yet."""
        return self.table if self.files.has(TABLE) else derived_table(self)

    @property
    def ranks(self) -> pd.DataFrame | None:
        """What `write_ranks` wrote; None if there is no such file. Raises RunError if it is damaged."""
        return self._once(RANKS, parse_ranks)

    @property
    def samples(self) -> Mapping[str, ShownSample]:
        """The samples of samples.json by id; empty if there is no such file. RunError if it is damaged."""
        return self._once(SAMPLES, parse_shown) or {}

    def _once(self, name: str, parse: Callable[[Path, bytes], Any]) -> Any | None:
        """What `parse` makes of a derived file, as long as that stays the same; None if there is none."""
        data = self.files.read(name)
        if data is None:
            return None
        if name not in self._parsed or self._parsed[name][0] is not data:
            self._parsed[name] = data, parse(self.path / name, data)
        return self._parsed[name][1]


class OfFolder(Protocol):
    """What has a run folder, such as what `qprobe.scan` returns."""

    folder: RunFolder


AnyRun = Path | str | RunFolder | OfFolder


def run_folder(run: AnyRun) -> RunFolder:
    """`run` as an object: what a public function makes of it first, so that no file is read twice."""
    if isinstance(run, RunFolder):
        return run
    return RunFolder(Path(run)) if isinstance(run, str | Path) else run.folder


def layer_table(run: AnyRun) -> pd.DataFrame:
    """The layer table of a run, from its units, see `qprobe.runs.layers.table.derived_table`.

    Raises RunError if it is no run or a file of it is damaged.
    """
    return derived_table(run_folder(run))
