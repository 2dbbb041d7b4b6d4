"""From the import path in a declaration to the thing it names."""

from __future__ import annotations

import importlib
from typing import Any


def imported(path: str) -> Any:
    """What "package.module:name" names; the module is imported now, and with it maybe torch.

    Raises ImportError or AttributeError if there is no such thing: a declaration is our own.
    """
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
