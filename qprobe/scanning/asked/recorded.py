"""The line that a reader of the results types for the same scan: a command, or Python."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from qprobe.loading.loaded import LoadedModel
from qprobe.loading.source import Source
from qprobe.options import DEFAULT_BUDGET, DEFAULT_DTYPE, ScanOptions, flag_of

NO_RESULT = ("model", "processor", "out", "check", "device", "max_memory", "progress")
"""Fields of `ScanOptions` that no number depends on; the model and its processor are named otherwise."""

_DEFAULTS = {x.name: x.default for x in fields(ScanOptions)}


def recorded(asked: ScanOptions, source: Source, loaded: LoadedModel | None) -> str:
    """What a reader of the results types: a command, or a line of Python for what lies in memory."""
    has_name = loaded is None or source.revision is not None
    if has_name and all(x is None or isinstance(x, Path) for x in (asked.data, asked.check_data)):
        return scan_command(asked, source.id)
    return scan_call(asked, source.id if has_name else None, "" if has_name else source.id)


def scan_call(asked: ScanOptions, model_id: str | None, kind: str) -> str:
    """The line of Python that scans what lies in memory, for people to read: with its options, and no folder.

    model_id: None for a loaded model without one, of the class `kind`.
    """
    model = "model, processor=processor" if model_id is None else repr(model_id)
    budget = (asked.budget or DEFAULT_BUDGET) if asked.max_kl is None else None
    images = None if asked.images is None else asked.images.resolve().name
    options = {**vars(asked), "images": images, "budget": budget}
    if asked.dtype == DEFAULT_DTYPE:
        del options["dtype"]
    words = [
        f"{name}={_in_python(value)}"
        for name, value in options.items()
        if name not in NO_RESULT and not _is_default(name, value)
    ]
    return f"qprobe.scan({', '.join([model, *words])})" + (f"  # model: a loaded {kind}" if kind else "")


def _is_default(name: str, value: Any) -> bool:
    """Whether an option is as if it had not been passed; rows in memory may compare to no truth value."""
    is_plain = value is None or isinstance(value, str | int | float | tuple | Path)
    return is_plain and value == _DEFAULTS.get(name)


def _in_python(value: Any) -> str:
    """A value as Python writes it: a file by its name, a function by its own, rows in memory as `rows`."""
    if isinstance(value, Path):
        return repr(data_name(value))
    if callable(value):
        return getattr(value, "__name__", type(value).__name__).strip("<>")
    return repr(value) if isinstance(value, str | int | float | tuple) else "rows"


def data_name(data: Any) -> str:
    """A file's name, or the id of a data set of the hub; "rows" for what lies in memory."""
    if not isinstance(data, Path):
        return "rows"
    return data.name if data.exists() or data.suffix else str(data)


def scan_command(asked: ScanOptions, model_id: str) -> str:
    """What a reader of the results types: every option that changes them, and no path of a folder here.

    The model has its id, the user's samples the name of their folder or file.
    """
    shown = {
        "images": None if asked.images is None else asked.images.resolve().name,
        "data": None if asked.data is None else data_name(asked.data),
        "check_data": None if asked.check_data is None else data_name(asked.check_data),
        "dtype": "fp16" if asked.dtype == "float16" else None,
        "budget": (asked.budget or DEFAULT_BUDGET) if asked.max_kl is None else None,
        "measures": ",".join(asked.measures) if asked.measures else None,
        "metric": asked.metric if isinstance(asked.metric, str) else None,
    }
    words = ["qprobe", "scan", "--model", model_id]
    for name, default in _DEFAULTS.items():
        value = shown[name] if name in shown else getattr(asked, name)
        if name in NO_RESULT or value == default:
            continue
        words += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    return shlex.join(words)
