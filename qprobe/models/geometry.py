"""Geometries: the configs of known models as data, so that their sizes can be had without a network.

`geometries/NAME.json` holds
- source: where the shapes are from; config: what transformers builds them from (None: the embedded demo's)
- parameters, parameters_source: the parameter count stated elsewhere, and where; parameters_are: "published",
  "derived" (by hand from published shapes) or "own" (the embedded models)
- sizes: bytes of its layouts, as `qprobe plan` computes them, for lists that must not build models.
Tests build every one of them and hold both against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from qprobe.system.decoding import decode, strict_json

FOLDER = Path(__file__).with_name("geometries")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a whole model; the two 4-bit figures without and with the quantization state."""

    linear_layers: int
    bytes_16bit: int
    nf4_layers: int
    nf4_parameter_bytes: int
    nf4_total_bytes: int


@dataclass(frozen=True)
class Geometry:
    """One file of `geometries`; see the module's docstring."""

    source: str
    parameters: int
    parameters_are: Literal["published", "derived", "own"]
    parameters_source: str
    sizes: Sizes
    config: dict[str, Any] | None


@cache
def read_geometry(name: str) -> Geometry:
    """The geometry `name`. Raises KeyError if there is none, which is our mistake and not a user's."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise KeyError(name)
    return decode(Geometry, strict_json(path.read_bytes()), name)
