"""A list that was exported gives the manifest's layers when transformers loads with it, also from disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.quantize import quantize
from qprobe.checkpoint.verify import verify
from qprobe.exports import export_manifest
from qprobe.loading.config import load_config, model_class
from qprobe.loading.source import resolve
from tests.checkpoint.manifests import every_third, manifest_for

FIVE = ("mllama", "qwen2_vl", "qwen2_5_vl", "llava_pixtral", "llama")


def plainly(folder: Path, **options: Any) -> Any:
    """What `from_pretrained` gives a user, without any code of qprobe's build."""
    cls = model_class(load_config(resolve(str(folder))))
    return cls.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
@pytest.mark.parametrize("tool", ["transformers", "vllm"])
def test_exported_keywords_load_exactly_the_manifests_layers_and_so_does_the_saved_checkpoint(
    name: str, tool: str, tiny_folder: Callable[[str], Path], tmp_path: Path
):
    folder = tiny_folder(name)
    kept = every_third(folder)
    if tool == "vllm":  # fused groups whole: no part of an attention or of a gated MLP
        kept = tuple(x for x in kept if x.rpartition(".")[2] not in SPLIT)
    manifest = manifest_for(folder, kept)
    data = json.loads(export_manifest(manifest, tool).text)
    config = BitsAndBytesConfig(**data.get("quantization_config", data))
    model = plainly(folder, quantization_config=config)
    verify(model, manifest)
    model.save_pretrained(tmp_path)
    verify(plainly(tmp_path), manifest)
    found = audit(tmp_path, manifest, load=True, device="cpu")
    assert found.ok and found.total_bytes == manifest.budget.total_bytes, found.problems


SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "joint"),
    [("llama", "model.layers.0"), ("qwen2_vl", "language_model.model.layers.0")],  # vLLM's own names
)
def test_a_checkpoint_for_vllm_lists_its_names_too_and_transformers_loads_it_as_ever(
    name: str, joint: str, tiny_folder: Callable[[str], Path], tmp_path: Path
):
    folder, out = tiny_folder(name), tmp_path / "out"
    kept = {x.name for x in manifest_for(folder).layers if ".layers.0." in x.name}
    manifest = manifest_for(folder, kept)
    quantize(manifest, out, str(folder), "cpu", for_tool="vllm")
    listed = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {f"{joint}.self_attn.qkv_proj", f"{joint}.mlp.gate_up_proj"} <= set(listed)
    verify(plainly(out), manifest)
    tensors = load_file(out / "model.safetensors")
    states = [x for x in tensors if ".weight.quant_state.bitsandbytes__nf4" in x]
    assert len(states) == sum(x.is_four_bit for x in manifest.layers)
    for key in states:
        # vllm-bnb-plugin 0.0.3 takes for a weight's state whatever key has its name and a dot anywhere.
        weight = key.partition(".quant_state")[0]
        assert all(x.startswith(f"{weight}.") for x in tensors if f"{weight}." in x)


def test_the_python_snippet_loads_the_manifests_model(tiny_folder: Callable[[str], Path], tmp_path: Path):
    folder = tiny_folder("qwen2_vl")
    manifest = manifest_for(folder, every_third(folder))
    text = export_manifest(manifest, "transformers-python").text
    place = json.dumps(manifest.model.id)
    assert text.count(place) == 1
    names: dict[str, Any] = {}
    exec(text.replace(place, json.dumps(str(folder))), names)
    verify(names["model"].to("cpu"), manifest)
