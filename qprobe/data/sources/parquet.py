"""One Parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from qprobe.data.source import Rows, Source, refuse_split, rows_of_arrow
from qprobe.errors import SampleError
from qprobe.system.foreign import check_foreign
from qprobe.system.headers.parquet import columns_of, page_sizes

_FIX = "Pass a .parquet file to --data."
_ROWS_AT_ONCE = 64  # with the bytes of their images
_AT_ONCE_BYTES = 2**30  # that they may take; a dictionary lets every row be as long as all of its column
_GROUP_BYTES = 2**32  # of a row group unpacked; those of the hub's data sets have some hundred MB
_GROUP_VALUES = 2**26
_PAGE_BYTES = 2**28  # unpacked: writers end one at some MB; reading takes four times as much


def _takes(data: Any) -> bool:
    if not isinstance(data, str | Path):
        return False
    path = Path(data)
    return path.suffix.lower() == ".parquet" and path.exists() and not path.is_dir()


def _rows(data: Any, split: str | None) -> Rows:
    import pyarrow
    import pyarrow.parquet as parquet

    path = Path(data)
    refuse_split(split, path.name)
    check_foreign(path, SampleError, _FIX, None)
    number = 0
    try:
        with parquet.ParquetFile(path) as file, open(path, "rb") as pages:
            for batch in file.iter_batches(batch_size=_rows_at_once(pages)):
                for row in rows_of_arrow(batch):
                    number += 1
                    yield number, row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise SampleError(f"{path} is not a complete Parquet file ({error}). {_FIX}") from None
    if number == 0:
        raise SampleError(f"{data} has no rows. {_FIX}")


def _rows_at_once(file: BinaryIO) -> int:
    """How many rows of the open `file` can be held at once.

    Its pages are looked at, since a footer may say anything. Raises ValueError where a page or a row group is
    too large: a few bytes can stand for any number of rows, or a long one.
    """
    columns = [column for group in columns_of(file) for column in group]
    sizes = [list(page_sizes(file, x)) for x in columns]
    page = max((size for one in sizes for size in one), default=0)
    if page > _PAGE_BYTES:
        raise ValueError(f"a page has {page:,} bytes, more than can be read; write it with smaller pages")
    largest = max((sum(one) for one in sizes), default=0)
    values = max((x.values for x in columns), default=0)
    if largest > _GROUP_BYTES or values > _GROUP_VALUES:
        raise ValueError(
            f"a row group claims {largest:,} bytes and {values:,} values of one column, more than can be "
            "read; write it with smaller row groups"
        )
    return max(1, min(_ROWS_AT_ONCE, _AT_ONCE_BYTES // max(largest, 1)))


SOURCE = Source(
    what="a .parquet file",
    row="row",
    order=12,
    takes=_takes,
    name=lambda data: Path(data).name,
    folder=lambda data: Path(data).parent,
    rows=_rows,
)
