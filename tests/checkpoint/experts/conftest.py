"""Mixtures of experts, each quantized once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qprobe.checkpoint.quantize import quantize
from qprobe.manifest.records import Manifest
from tests.checkpoint.manifests import inventory_of, manifest_for


class Packed(NamedTuple):
    """A mixture: its 16-bit folder, a manifest that keeps one of its experts' weights, what was written."""

    source: Path
    manifest: Manifest
    out: Path


@pytest.fixture(scope="session")
def packed(
    mixture: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Packed]:
    """`packed(name)`: what `quantize` writes of that model, once; the last of its experts stay in 16-bit."""
    root = tmp_path_factory.mktemp("packed")
    made: dict[str, Packed] = {}

    def one(name: str) -> Packed:
        if name not in made:
            source = mixture(name)
            kept = [x.name for x in inventory_of(source).layers if x.experts][-1:]
            manifest = manifest_for(source, kept)
            quantize(manifest, root / name, str(source), "cpu")
            made[name] = Packed(source, manifest, root / name)
        return made[name]

    return one
