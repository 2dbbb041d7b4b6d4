"""A file dropped into a folder of the package, for the time of a test, as a developer would add it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any


@contextmanager
def dropped(package: str, name: str, source: str, folder: Path, *caches: Any) -> Iterator[None]:
    """Makes the module `name` with `source` a part of `package`; `caches` are cleared before and after."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(dedent(source), "utf-8")
    path = import_module(package).__path__
    path.append(str(folder))
    try:
        _clear(caches)
        yield
    finally:
        path.remove(str(folder))
        sys.modules.pop(f"{package}.{name}", None)
        _clear(caches)


def _clear(caches: tuple[Any, ...]) -> None:
    for cache in caches:
        cache.cache_clear()
