"""A data set of the Hugging Face hub by its id, where `datasets` is installed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qprobe.data.source import Rows, Source, only_split
from qprobe.data.sources.memory import rows_of_dataset
from qprobe.errors import MachineError, SampleError
from qprobe.system.wording import shortened

_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def _takes(data: Any) -> bool:
    if not isinstance(data, str | Path) or not _ID.fullmatch(str(data)) or Path(data).exists():
        return False
    return (
        not Path(data).suffix[1:].isalpha()
    )  # "org/name-v1.5" is an id, "folder/rows.csv" a file that is missing


def _rows(data: Any, split: str | None) -> Rows:
    name = str(data)
    if find_spec("datasets") is None:
        raise MachineError(
            f"{name} is no file here, and data sets of the hub are read by a package that is not installed. "
            "Install it: pip install datasets."
        )
    import datasets

    try:
        # Said in full: left out, those before 4 would ask on the terminal whether to run a loading script.
        found = datasets.load_dataset(name, trust_remote_code=False)
    except Exception as error:  # its builders, the hub and the network raise what they like
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SampleError(
            f"{name} is no file here, and it cannot be loaded as a data set of the hub "
            f"({shortened(first, 300)}). Pass a file, or the id of a data set."
        ) from None
    yield from rows_of_dataset(found[only_split([str(x) for x in found], split, name)])


SOURCE = Source(
    what="the id of a data set of the hub",
    row="row",
    order=80,
    takes=_takes,
    name=str,
    folder=lambda _: Path(),
    rows=_rows,
)
