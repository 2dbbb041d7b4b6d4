"""One file per family of models, found by looking into this folder: each declares a FAMILY."""

from __future__ import annotations

from functools import cache

from qprobe.models.family import GENERIC, Engine, Family
from qprobe.system.discovery import declared


@cache
def families() -> tuple[Family, ...]:
    """Every family, in the order of its file's name."""
    return tuple(declared(__name__, "FAMILY", Family).values())


@cache
def family_of(architecture: str) -> Family:
    """The family of the class name `architecture`; the generic one if no file lists it."""
    found = [x for x in families() if architecture in x.architectures]
    assert len(found) < 2, f"{architecture} is listed by {len(found)} families"
    return found[0] if found else GENERIC


def engine_of(name: str, architecture: str) -> Engine:
    """How the inference engine `name` treats `architecture`."""
    return family_of(architecture).engines.get(name) or GENERIC.engines[name]
