"""The names a linear has had, against the module trees of the transformers versions that had them."""

from __future__ import annotations

import pytest

from qprobe.models.spellings import spellings
from tests.models import trees

# By architecture, for a layer of each kind: today's name, that of transformers 4.57.6 and 5.0.0, and that of
# 4.51.3, read from the module trees of those versions (InternVL came with 4.52, so its oldest names are those
# of the published files). Where today's name is the older one too, None.
KNOWN = {
    "MllamaForConditionalGeneration": [
        (
            "model.language_model.layers.1.cross_attn.o_proj",
            None,
            "language_model.model.layers.1.cross_attn.o_proj",
        ),
        (
            "model.vision_model.transformer.layers.0.mlp.fc2",
            None,
            "vision_model.transformer.layers.0.mlp.fc2",
        ),
        ("model.multi_modal_projector", None, "multi_modal_projector"),
        ("lm_head", None, "language_model.lm_head"),
    ],
    "Qwen2VLForConditionalGeneration": [
        ("model.language_model.layers.1.mlp.down_proj", None, "model.layers.1.mlp.down_proj"),
        ("model.visual.blocks.0.attn.qkv", None, "visual.blocks.0.attn.qkv"),
        ("model.visual.merger.mlp.0", None, "visual.merger.mlp.0"),
        ("lm_head", None, "lm_head"),
    ],
    "Qwen2_5_VLForConditionalGeneration": [
        ("model.language_model.layers.1.self_attn.q_proj", None, "model.layers.1.self_attn.q_proj"),
        ("model.visual.blocks.1.mlp.gate_proj", None, "visual.blocks.1.mlp.gate_proj"),
        ("lm_head", None, "lm_head"),
    ],
    "LlavaForConditionalGeneration": [
        (
            "model.vision_tower.transformer.layers.0.feed_forward.gate_proj",
            None,
            "vision_tower.transformer.layers.0.feed_forward.gate_proj",
        ),
        ("model.multi_modal_projector.linear_1", None, "multi_modal_projector.linear_1"),
        (
            "model.language_model.layers.1.mlp.up_proj",
            None,
            "language_model.model.layers.1.mlp.up_proj",
        ),
        ("lm_head", None, "language_model.lm_head"),
    ],
    "LlavaNextForConditionalGeneration": [
        (
            "model.vision_tower.encoder.layers.0.self_attn.k_proj",
            "model.vision_tower.vision_model.encoder.layers.0.self_attn.k_proj",
            "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj",
        ),
        ("lm_head", None, "language_model.lm_head"),
    ],
    "Gemma3ForConditionalGeneration": [
        (
            "model.vision_tower.head.mlp.fc2",
            "model.vision_tower.vision_model.head.mlp.fc2",
            "vision_tower.vision_model.head.mlp.fc2",
        ),
        (
            "model.language_model.layers.0.self_attn.q_proj",
            None,
            "language_model.model.layers.0.self_attn.q_proj",
        ),
    ],
    "PaliGemmaForConditionalGeneration": [
        (
            "model.vision_tower.encoder.layers.1.mlp.fc2",
            "model.vision_tower.vision_model.encoder.layers.1.mlp.fc2",
            "vision_tower.vision_model.encoder.layers.1.mlp.fc2",
        ),
        ("model.multi_modal_projector.linear", None, "multi_modal_projector.linear"),
    ],
    "Idefics3ForConditionalGeneration": [
        (
            "model.vision_model.encoder.layers.0.self_attn.k_proj",
            None,
            "model.vision_model.encoder.layers.0.self_attn.k_proj",
        ),
        (
            "model.text_model.layers.1.mlp.down_proj",
            None,
            "model.text_model.layers.1.mlp.down_proj",
        ),
        ("lm_head", None, "lm_head"),
    ],
    "SmolVLMForConditionalGeneration": [
        ("model.connector.modality_projection.proj", None, "model.connector.modality_projection.proj"),
    ],
    "InternVLForConditionalGeneration": [
        (
            "model.vision_tower.encoder.layer.0.attention.q_proj",
            None,
            "vision_tower.encoder.layer.0.attention.q_proj",
        ),
        ("lm_head", None, "language_model.lm_head"),
    ],
    "LlamaForCausalLM": [
        ("model.layers.0.self_attn.q_proj", None, "model.layers.0.self_attn.q_proj"),
        ("lm_head", None, "lm_head"),
    ],
    "Qwen3ForCausalLM": [("model.layers.0.self_attn.q_proj", None, "model.layers.0.self_attn.q_proj")],
}


@pytest.mark.parametrize("architecture", KNOWN)
def test_each_layer_had_these_names(architecture: str):
    known = {x.name: x.checkpoint_name for x in trees.inventory(architecture).layers}
    for name, wrapped, legacy in KNOWN[architecture]:
        found = spellings(name, known[name], architecture)
        assert (found.name, found.wrapped, found.legacy) == (name, wrapped or name, legacy)


@pytest.mark.parametrize("architecture", trees.CONFIGS)
def test_no_two_layers_share_a_name_in_any_version(architecture: str):
    all_of = [
        spellings(x.name, x.checkpoint_name, architecture) for x in trees.inventory(architecture).layers
    ]
    for pick in (lambda x: x.name, lambda x: x.wrapped, lambda x: x.legacy, lambda x: x.saved):
        assert len({pick(x) for x in all_of}) == len(all_of)
