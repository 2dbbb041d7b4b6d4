"""The versions of the libraries that a number depends on; no torch."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("qprobe", "torch", "transformers", "bitsandbytes")


def library_versions() -> dict[str, str]:
    """The versions that can change a number, by distribution name.

    A library that is on the path without having been installed (a checkout) says its version itself.
    """
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = import_module(name).__version__
    return found
