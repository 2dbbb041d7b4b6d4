"""A folder of data files, as a data set of the hub lies on a disk: shards, splits, metadata of images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from qprobe.data.source import Rows, Source, is_split, only_split, source_of, split_in
from qprobe.errors import SampleError

_KINDS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_METADATA = tuple(f"metadata{x}" for x in (".jsonl", ".csv", ".parquet"))
_ABOUT = ("dataset_info.json", "dataset_infos.json", "config.json", "state.json")  # of a data set, no rows
_FILES = ("file_name", "file_names")  # paths that are relative to the file that names them
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?:-[0-9a-f]+)?$")


def _takes(data: Any) -> bool:
    return isinstance(data, str | Path) and Path(data).is_dir() and bool(_files(Path(data)))


def _files(folder: Path) -> list[tuple[str | None, Path]]:
    """(split or None, file) of each file of rows: in the folder, in its data/, or metadata of its splits."""
    for place in (folder, folder / "data"):
        metadata = [place / x for x in _METADATA if (place / x).is_file()]
        if metadata:
            return [(None, x) for x in metadata]
        found = _data_files(place)
        if found:
            return _by_split(found)
        splits = [x for x in sorted(place.glob("*/")) if is_split(x.name)]
        of_splits = [(x.name, x / name) for x in splits for name in _METADATA if (x / name).is_file()]
        if of_splits:
            return [*of_splits]
    return []


def _data_files(folder: Path) -> list[Path]:
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        x
        for x in found
        if _kind(x) in _KINDS and x.name not in _ABOUT and not x.name.startswith(".") and not x.is_dir()
    ]


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _by_split(files: list[Path]) -> list[tuple[str | None, Path]]:
    """Each with its split, if one of the files says which it holds, as train-00000-of-00002.parquet does."""
    stems = [Path(x.name.removesuffix(".gz")).stem for x in files]
    if not any(_SHARD.search(x) or split_in(x) for x in stems):
        return [(None, x) for x in files]
    return [(split_in(stem) or _SHARD.sub("", stem), x) for stem, x in zip(stems, files, strict=True)]


def _rows(data: Any, split: str | None) -> Rows:
    folder = Path(data)
    found = _files(folder)
    splits = list(dict.fromkeys(x for x, _ in found if x is not None))
    if splits:
        wanted = only_split(splits, split, folder.name)
        files = [path for name, path in found if name == wanted]
    elif split is not None:
        raise SampleError(f"--split {split} does not apply to {folder.name}, whose files name no splits.")
    else:
        files = [path for _, path in found]
    kinds = {_kind(x) for x in files}
    if len(kinds) > 1:
        names = ", ".join(x.name for x in files[:4])
        raise SampleError(
            f"{folder.name} holds data files of several kinds ({names}{', ...' if len(files) > 4 else ''}), "
            "so it is not clear which are the rows. Pass one of them to --data."
        )
    yield from enumerate(chain.from_iterable(_rows_of(x, folder) for x in files), start=1)


def _rows_of(path: Path, folder: Path) -> Iterator[Any]:
    """The rows of one file, whose names of files begin at `folder`."""
    start = PurePosixPath(path.parent.relative_to(_base(folder)).as_posix())
    for _, row in source_of(path).rows(path, None):
        names = [x for x in _FILES if isinstance(row, dict) and row.get(x)] if start.parts else []
        yield {**row, **{x: _from(start, row[x]) for x in names}} if names else row


def _from(start: PurePosixPath, names: Any) -> Any:
    if isinstance(names, list):
        return [_from(start, x) for x in names]
    return str(start / names) if isinstance(names, str) else names


def _base(folder: Path) -> Path:
    """The folder that paths of images are relative to: data/, where the files are in it."""
    path = _files(folder)[0][1]
    return folder / "data" if folder / "data" in path.parents else folder


SOURCE = Source(
    what="a folder of such files, or of images with a metadata.jsonl",
    row="row",
    order=40,
    takes=_takes,
    name=lambda data: Path(data).name,
    folder=lambda data: _base(Path(data)),
    rows=_rows,
)
