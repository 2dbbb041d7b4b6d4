"""Where adapters go: every linear is in one part, and what is left out is named."""

from __future__ import annotations

from typing import Any

import pytest

from qprobe.errors import QprobeError
from qprobe.models.adapting import PARTS, adapted
from tests.models import trees

# By hand, from the names of transformers' modules.
PROJECTORS = {
    "MllamaForConditionalGeneration": "model.multi_modal_projector",
    "Qwen2VLForConditionalGeneration": "model.visual.merger.",
    "Qwen2_5_VLForConditionalGeneration": "model.visual.merger.",
    "LlavaForConditionalGeneration": "model.multi_modal_projector.",
    "LlavaNextForConditionalGeneration": "model.multi_modal_projector.",
    "PaliGemmaForConditionalGeneration": "model.multi_modal_projector.",
    "Idefics3ForConditionalGeneration": "model.connector.",
    "SmolVLMForConditionalGeneration": "model.connector.",
    "InternVLForConditionalGeneration": "model.multi_modal_projector.",
}
TOWERS = ("model.vision_model.", "model.visual.", "model.vision_tower.")
QWEN = "Qwen2VLForConditionalGeneration"


def ask(architecture: str, adapt: str, for_tool: str | None = None) -> tuple[str, ...]:
    layers = trees.inventory(architecture).layers
    fixed = frozenset(x.name for x in layers if x.fixed)
    return adapted([x.name for x in layers], fixed, architecture, adapt, for_tool).names


@pytest.mark.parametrize("architecture", trees.CONFIGS)
def test_every_linear_but_the_head_is_in_exactly_one_part(architecture: str):
    names = [x.name for x in trees.inventory(architecture).layers if not x.fixed]
    projector = PROJECTORS.get(architecture)
    found: dict[str, tuple[str, ...]] = {}
    for part in PARTS:
        try:
            found[part] = ask(architecture, part)
        except QprobeError as error:
            assert f"--adapt {part} leaves no linear layer" in str(error)
            found[part] = ()
    assert sorted(x for part in found.values() for x in part) == sorted(names)
    assert ask(architecture, "all") == tuple(names)
    assert set(found["projector"]) == {x for x in names if projector and x.startswith(projector)}
    assert set(found["vision"]) == {x for x in names if x.startswith(TOWERS)} - set(found["projector"])


def test_modules_by_name_stand_for_the_linears_in_them():
    found = ask(QWEN, "model.language_model.layers.0.mlp, projector")
    mlp = [f"model.language_model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert sorted(found) == sorted([*mlp, "model.visual.merger.mlp.0", "model.visual.merger.mlp.2"])
    with pytest.raises(QprobeError, match=r"'model\.language_model\.layers\.0\.ml' names no linear layer of"):
        ask(QWEN, "language,model.language_model.layers.0.ml")
    with pytest.raises(QprobeError, match="It has linear layers in: language"):
        ask("LlamaForCausalLM", "vision")


def test_what_vllm_serves_no_adapter_on_is_left_out_and_named():
    assert ask(QWEN, "all", "vllm") == ask(QWEN, "language")
    names = [x.name for x in trees.inventory(QWEN).layers]
    (note,) = adapted(names, frozenset(), QWEN, "projector,language", "vllm").notes()
    assert note == (
        "No adapter on model.visual.merger.mlp.0, model.visual.merger.mlp.2 (2 in all): vllm serves adapters "
        "of the language model only."
    )


@pytest.mark.parametrize("kind", ["mamba2", "falcon_h1", "llama"])
def test_what_peft_refuses_is_left_out_and_nothing_else(kind: str):
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    if kind == "mamba2":
        sizes |= {"num_heads": 4, "head_dim": 16, "state_size": 8}
    else:
        sizes |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}

    def model() -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))

    built = model()
    linears = [name for name, x in built.named_modules() if type(x) is torch.nn.Linear]
    found = adapted(linears, frozenset({"lm_head"}), type(built).__name__, "all")
    tuned = peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=list(found.names)), built)
    assert sum(hasattr(x, "lora_A") for x in tuned.modules()) == len(found.names)
    for one in found.left_out:
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=[one.layer]), model())
    assert bool(found.left_out) == (kind != "llama")


@pytest.mark.parametrize(
    ("adapt", "left_out"), [("language", (0, 1)), ("model.layers.1", (1,)), ("all", (0, 1))]
)
def test_fused_experts_that_are_meant_are_named_among_those_without(adapt: str, left_out: tuple[int, ...]):
    linears = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    experts = [f"model.layers.{n}.mlp.experts.gate_up_proj" for n in (0, 1)]
    found = adapted(linears, frozenset(), "Qwen3MoeForCausalLM", adapt, experts=experts)
    assert [x.layer for x in found.left_out] == [experts[n] for n in left_out]
    assert not set(found.names) & set(experts)
    (note,) = found.notes()
    assert note.endswith(f"({len(left_out)} in all): fused weights of experts take none.")
