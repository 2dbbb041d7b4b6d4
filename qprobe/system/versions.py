"""The versions of the libraries that a number depends on; no torch."""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from importlib.metadata import PackageNotFoundError

LIBRARIES = ("qprobe", "torch", "transformers", "bitsandbytes")
version = cache(metadata.version)  # which reads a file of the distribution at each call


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
