"""Parquet: one file, or a folder of them whose rows follow one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qprobe.data.source import Rows, Source, only_split, rows_of_arrow
from qprobe.errors import SampleError
from qprobe.system.foreign import check_foreign

_FIX = "Pass a .parquet file to --data."
_ROWS_AT_ONCE = 64  # with the bytes of their images
_AT_ONCE_BYTES = 2**30  # that they may take; a dictionary lets every row be as long as all of its column
_GROUP_BYTES = 2**32  # of a row group unpacked; those of the hub's data sets have some hundred MB
_GROUP_VALUES = 2**26


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def _takes(data: Any) -> bool:
    if not isinstance(data, str | Path):
        return False
    path = Path(data)
    return bool(_files(path)) if path.is_dir() else path.suffix.lower() == ".parquet" and path.exists()


def _rows(data: Any, split: str | None) -> Rows:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    for path in _of_split(Path(data), split):
        check_foreign(path, SampleError, _FIX, None)
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata)):
                    for row in rows_of_arrow(batch):
                        number += 1
                        yield number, row
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise SampleError(f"{path} is not a complete Parquet file ({error}). {_FIX}") from None
    if number == 0:
        raise SampleError(f"{data} has no rows. {_FIX}")


def _rows_at_once(found: Any) -> int:
    """How many rows of a file that says this (pyarrow's FileMetaData) of itself can be held at once.

    Raises ValueError where a row group is too large: a few bytes of Parquet can claim any number of rows.
    """
    groups = [found.row_group(i) for i in range(found.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    largest = max((x.total_uncompressed_size for x in columns), default=0)
    values = max((x.num_values for x in columns), default=0)
    if largest > _GROUP_BYTES or values > _GROUP_VALUES:
        raise ValueError(
            f"a row group claims {largest:,} bytes and {values:,} values of one column, more than can be "
            "read; write it with smaller row groups"
        )
    return max(1, min(_ROWS_AT_ONCE, _AT_ONCE_BYTES // max(largest, 1)))


def _of_split(path: Path, split: str | None) -> list[Path]:
    """The files of a split, which are called train-00000-of-00002.parquet and the like."""
    files = _files(path)
    names = list(dict.fromkeys(x.stem.split("-")[0] for x in files))
    if split is None and (len(files) == 1 or len(names) == len(files)):
        return files  # files that are not named by splits are read one behind the other
    wanted = only_split(names, split, path.name)
    return [x for x in files if x.stem.split("-")[0] == wanted]


SOURCE = Source(
    what="a .parquet file or a folder of them",
    row="row",
    order=30,
    takes=_takes,
    name=lambda data: Path(data).name,
    folder=lambda data: Path(data) if Path(data).is_dir() else Path(data).parent,
    rows=_rows,
)
