"""`export --to peft --adapt` names the layers that `finetune --adapt` trains adapters on, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

import qprobe
from qprobe.exports import export_manifest
from qprobe.manifest.read import read_manifest
from qprobe.manifest.write import write_manifest
from tests import tiny
from tests.checkpoint.manifests import every_third, manifest_for
from tests.scanning.asked import write_lines

pytestmark = pytest.mark.slow

# By hand, from the names of transformers' modules.
PARTS = {
    "mllama": {
        "language": ("model.language_model.",),
        "projector": ("model.multi_modal_projector",),
        "vision": ("model.vision_model.",),
    },
    "qwen2_vl": {
        "language": ("model.language_model.",),
        "projector": ("model.visual.merger.",),
        "vision": ("model.visual.blocks.",),
    },
}
MODULES = ("model.language_model.layers.1.mlp", "model.language_model.layers.0.self_attn.q_proj")


@pytest.fixture
def asked(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """`asked(name)`: a run of two steps on the tiny model of that name; nothing moves in the first."""

    def options(name: str) -> dict[str, Any]:
        folder = tiny_folder(name)
        (tmp_path / "a.png").write_bytes(tiny.picture(0))
        rows = [{"image": "a.png", "prompt": "what?", "answer": f"a coastal train {i}"} for i in range(2)]
        write_manifest(tmp_path / "skiplist.json", manifest_for(folder, every_third(folder)))
        return {
            "manifest": tmp_path / "skiplist.json", "data": write_lines(tmp_path / "train.jsonl", *rows),
            "out": tmp_path / "out", "model": str(folder), "device": "cpu", "steps": 2, "accumulation": 1,
            "rank": 2, "held_out": 0.0,
        }  # fmt: skip

    return options


@pytest.mark.parametrize("adapt", ["language", "projector", "vision", "vision,projector", ",".join(MODULES)])
@pytest.mark.parametrize("name", PARTS)
def test_the_exported_pattern_means_the_layers_that_a_run_adapts(
    name: str, adapt: str, asked: Callable[[str], dict[str, Any]]
):
    options = asked(name)
    places = MODULES if "." in adapt else sum((PARTS[name][part] for part in adapt.split(",")), ())
    layers = read_manifest(options["manifest"]).layers
    expected = {x.name for x in layers if x.name.startswith(places)}
    qprobe.finetune(**options, adapt=adapt)
    trained = load_file(options["out"] / "adapter_model.safetensors")
    # Of an adapter that no gradient reached, B would be as it began.
    moved = {n.removesuffix(".lora_B.weight") for n, x in trained.items() if "lora_B" in n and x.any()}
    assert {n.removeprefix("base_model.model.") for n in moved} == expected != set()
    assert len(trained) == 2 * len(expected)
    found = json.loads(export_manifest(options["manifest"], "peft", adapt).text)
    model, _ = qprobe.load_dynamic_4bit(options["manifest"], options["model"], "cpu")
    model = inject_adapter_in_model(LoraConfig(r=1, target_modules=found["target_modules"]), model)
    assert {n for n, x in model.named_modules() if hasattr(x, "lora_A")} == expected
    assert found["layers_4bit"] == [x.name for x in layers if x.precision == "nf4"]
