"""The names that one linear has had: in today's transformers, in earlier ones, and in files on the hub.

Compared with the module trees of transformers 4.51.3, 4.57.6, 5.0.0 and 5.23.0 for every architecture that
the tests list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Until 5.0 the CLIP and SigLIP towers wrapped their encoder in one more module, `vision_model`; files on the
# hub still do. Pixtral (`transformer.layers`) and InternVL (`encoder.layer`) never had it.
_BARE_TOWER = re.compile(r"((?:^|\.)vision_tower)\.(encoder\.layers|head)\.")


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


def spellings(name: str, checkpoint_name: str) -> Spellings:
    """The spellings of the linear `name`, which today's transformers writes as `checkpoint_name`."""
    return Spellings(name, _wrapped(name), _wrapped(checkpoint_name), checkpoint_name)


def _wrapped(name: str) -> str:
    return _BARE_TOWER.sub(r"\1.vision_model.\2.", name)


def whole_parts(entry: str, name: str) -> bool:
    """What a reader means by an entry: whole dotted parts of the name, one after another."""
    return f".{entry}." in f".{name}."
