"""Fine-tuning a model whose experts are in 4-bit: adapters go on attention and shared linears."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import qprobe
from qprobe.errors import QprobeError
from qprobe.manifest.read import read_manifest
from qprobe.manifest.write import write_manifest
from qprobe.training.origin import load_finetuned
from tests.checkpoint.manifests import inventory_of, manifest_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def asked(mixture: Callable[[str], Path], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """`asked(name)`: three steps on that mixture, whose last weight of experts stays in 16-bit."""

    def options(name: str) -> dict[str, Any]:
        source = mixture(name)
        kept = [x.name for x in inventory_of(source).layers if x.experts][-1:]
        write_manifest(tmp_path / "skiplist.json", manifest_for(source, kept))
        rows = [json.dumps({"prompt": f"what is {x}?", "answer": "a coastal train"}) for x in range(4)]
        (tmp_path / "train.jsonl").write_text("\n".join(rows))
        return {
            "manifest": tmp_path / "skiplist.json", "data": tmp_path / "train.jsonl", "out": tmp_path / "out",
            "model": str(source), "device": "cpu", "steps": 3, "accumulation": 4, "learning_rate": 2e-2,
            "rank": 4, "held_out": 0.0, "max_length": 64,
        }  # fmt: skip

    return options


def adapted_by(folder: Path) -> set[str]:
    """The layers that the adapter in `folder` changes."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {re.sub(r"base_model\.model\.(.*)\.lora_[AB]\.weight", r"\1", key) for key in file.keys()}


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "deepseek_v3", "llama4"])
def test_adapters_go_on_attention_and_shared_linears(name: str, asked: Callable[[str], dict[str, Any]]):
    options = asked(name)
    done = qprobe.finetune(**options)
    losses = [loss for _, loss in done.history]
    assert len(losses) == 3 and losses[2] < losses[0]
    found = adapted_by(options["out"])
    manifest = read_manifest(options["manifest"])
    assert found == {
        x.name
        for x in manifest.layers
        if not x.is_experts and x.name != "lm_head" and "visual.blocks" not in x.name
    }
    assert (name != "qwen3_vl_moe") == any("shared_expert" in x for x in found)
    if name == "deepseek_v3":
        tuned, _ = load_finetuned(options["out"], device="cpu")
        assert len(found) == sum(hasattr(x, "lora_A") for x in tuned.modules())
        held: Any = tuned.get_base_model().get_submodule("model.layers.1.mlp.experts")
        assert set(held.parametrizations) == {"gate_up_proj"}  # the other one is kept


def test_adapters_go_on_the_one_layer_that_is_named(asked: Callable[[str], dict[str, Any]]):
    options = {**asked("qwen3_moe"), "steps": 1, "adapt": "model.layers.0.self_attn.q_proj"}
    qprobe.finetune(**options)
    assert adapted_by(options["out"]) == {"model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("word", [EXPERTS, f"language,{EXPERTS}.down_proj"])
def test_adapters_on_experts_are_refused_by_name(word: str, asked: Callable[[str], dict[str, Any]]):
    options = asked("mixtral")
    with pytest.raises(QprobeError, match=rf"{EXPERTS}.* take no adapter: peft .*target_parameters"):
        qprobe.finetune(**options, adapt=word)
    model, _ = qprobe.load_dynamic_4bit(options["manifest"], options["model"], "cpu")
    with pytest.raises(QprobeError, match="names fused weights of experts"):
        qprobe.lora_targets(model, word)
