"""The names that one linear has had: in today's transformers, in earlier ones, and in files on the hub.

Compared with the module trees of transformers 4.51.3, 4.57.6, 5.0.0 and 5.23.0 for every architecture that
the tests list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qprobe.models.families import family_of
from qprobe.models.family import Renaming


@dataclass(frozen=True)
class Spellings:
    """name: today's module name. wrapped: that of transformers 4.52 to 5.0. legacy: of 4.51 and before, which
    is also that of the files on the hub. saved: what today's transformers writes into a file."""

    name: str
    wrapped: str
    legacy: str
    saved: str

    @property
    def all(self) -> tuple[str, ...]:
        """Each spelling once, today's first."""
        return tuple(dict.fromkeys((self.name, self.wrapped, self.legacy, self.saved)))


def spellings(name: str, checkpoint_name: str, architecture: str) -> Spellings:
    """The spellings of the linear `name`, which today's transformers writes as `checkpoint_name`."""
    old = family_of(architecture).old_names
    return Spellings(name, renamed(name, old), renamed(checkpoint_name, old), checkpoint_name)


def renamed(name: str, renamings: Iterable[Renaming]) -> str:
    """`name` after each of `renamings` in turn."""
    new = name
    for pattern, replacement in renamings:
        new = re.sub(pattern, replacement, new)
    return new
