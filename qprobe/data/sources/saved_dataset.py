"""A folder that `datasets.save_to_disk` wrote, read by pyarrow, so that `datasets` need not be installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qprobe.data.source import Rows, Source, only_split, refuse_split, rows_of_arrow
from qprobe.errors import SampleError
from qprobe.system.decoding import strict_json
from qprobe.system.foreign import check_foreign, read_foreign

STATE, SPLITS = "state.json", "dataset_dict.json"
_FIX = "Pass a folder that datasets.save_to_disk wrote."
_LARGEST_STATE = 2**26


def _takes(data: Any) -> bool:
    return isinstance(data, str | Path) and any((Path(data) / x).is_file() for x in (STATE, SPLITS))


def _rows(data: Any, split: str | None) -> Rows:
    folder = Path(data)
    if (folder / SPLITS).is_file():
        names = _listed(folder / SPLITS, "splits")
        folder = folder / only_split(names, split, folder.name)
    else:
        refuse_split(split, folder.name)
    number = 0
    for path in _files(folder):
        for row in _rows_of(path):
            number += 1
            yield number, row
    if number == 0:
        raise SampleError(f"{folder} has no rows. {_FIX}")


def _rows_of(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow

    check_foreign(path, SampleError, _FIX, None)
    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            for batch in stream:
                for start in range(0, batch.num_rows, 64):  # with the bytes of their images
                    yield from rows_of_arrow(batch.slice(start, 64))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise SampleError(f"{path} is not a complete Arrow file ({error}). {_FIX}") from None


def _files(folder: Path) -> list[Path]:
    state = _object(folder / STATE)
    listed = state.get("_data_files")
    names = (
        [x.get("filename") if isinstance(x, dict) else None for x in listed]
        if isinstance(listed, list)
        else []
    )
    if not names or not all(isinstance(x, str) and Path(x).name == x for x in names):
        raise SampleError(f"{folder / STATE} lists no files of rows. {_FIX}")
    return [folder / str(x) for x in names]


def _listed(path: Path, key: str) -> list[str]:
    names = _object(path).get(key)
    if not isinstance(names, list) or not all(isinstance(x, str) and Path(x).name == x for x in names):
        raise SampleError(f"{path} lists no {key}. {_FIX}")
    return names


def _object(path: Path) -> dict[str, Any]:
    try:
        found = strict_json(read_foreign(path, SampleError, _FIX, _LARGEST_STATE))
    except (ValueError, json.JSONDecodeError) as error:
        raise SampleError(f"{path} is no JSON ({error}). {_FIX}") from None
    if not isinstance(found, dict):
        raise SampleError(f"{path} is no JSON object. {_FIX}")
    return found


SOURCE = Source(
    what="a folder of datasets.save_to_disk",
    row="row",
    order=10,
    takes=_takes,
    name=lambda data: Path(data).name,
    folder=lambda data: Path(data),
    rows=_rows,
)
