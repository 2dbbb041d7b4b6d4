"""Registries that are folders: one file per thing, found by looking into the folder."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

Declared = TypeVar("Declared")


def declared(package: str, name: str, kind: type[Declared]) -> dict[str, Declared]:
    """By module name, in its order: what every module of the folder `package` calls `name`.

    A module without that name is our own mistake, an AssertionError.
    """
    folder = import_module(package)
    found: dict[str, Declared] = {}
    for module in sorted(x.name for x in iter_modules(folder.__path__)):
        value = getattr(import_module(f"{package}.{module}"), name, None)
        assert isinstance(value, kind), f"{package}.{module} declares no {name} of {kind.__name__}"
        found[module] = value
    return found
