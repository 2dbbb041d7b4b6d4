"""What a config asks for is bounded before transformers builds anything of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qprobe.errors import ModelError
from qprobe.loading.config import load_config
from qprobe.loading.source import resolve


def edited(folder: Path, place: Path, part: str | None, key: str, value: object) -> str:
    """A folder that holds the config of `folder` alone, with one number changed."""
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part])[key] = value
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    return str(place)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "num_hidden_layers", 2**63),
        ("text_config", "num_hidden_layers", 1001),
        ("vision_config", "num_global_layers", 1e9),
        (None, "num_local_experts", 2**14 + 1),
        (None, "depths", [2, 10**6]),
    ],
)
def test_more_layers_or_experts_than_any_model_has_are_refused_by_name(
    tiny_folder: Callable[[str], Path], tmp_path: Path, part: str | None, key: str, value: object
):
    source = resolve(edited(tiny_folder("mllama"), tmp_path / "model", part, key, value))
    with pytest.raises(ModelError, match=f"for {key}, and no more than"):
        load_config(source)


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 1000), ("vocab_size_per_layer_input", 262144)]
)
def test_numbers_of_other_things_may_be_large(
    tiny_folder: Callable[[str], Path], tmp_path: Path, key: str, value: int
):
    source = resolve(edited(tiny_folder("llama"), tmp_path / "model", None, key, value))
    assert getattr(load_config(source), key) == value
