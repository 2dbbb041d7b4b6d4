"""A model, an adapter and a manifest, for tests of what is done with all three."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from qprobe.manifest.write import write_manifest
from tests.checkpoint.manifests import every_third, manifest_for
from tests.training.adapters import DECODERS, write_adapter, write_family


@pytest.fixture(scope="module")
def family(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, with an adapter and a manifest beside it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            model = root / "model"
            if name in DECODERS:
                write_family(name, model)
            else:
                copytree(tiny_folder(name), model)
            write_adapter(model, root / "adapter")
            write_manifest(root / "skiplist.json", manifest_for(model, every_third(model)))
            made[name] = root
        return made[name]

    return folder
