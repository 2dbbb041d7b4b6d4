"""Small models on the meta device, one for each architecture whose names qprobe must know."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import transformers as tf
from torch import nn

from qprobe.loading.inventory import list_layers
from qprobe.loading.skeleton import meta_model
from qprobe.records import FormatSpec, Inventory
from tests import tiny

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    **tiny.IDS,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 14,
}
_CLIP = {"model_type": "clip_vision_model", **_VISION}
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION}
_INTERN = {**_VISION, "image_size": [42, 42], "patch_size": [14, 14]}

CONFIGS: dict[str, Callable[[], Any]] = {
    "MllamaForConditionalGeneration": tiny.mllama_config,
    "Qwen2VLForConditionalGeneration": tiny.qwen2_vl_config,
    "Qwen2_5_VLForConditionalGeneration": tiny.qwen2_5_vl_config,
    "LlavaForConditionalGeneration": tiny.llava_pixtral_config,
    "LlavaNextForConditionalGeneration": lambda: tf.LlavaNextConfig(
        vision_config=_CLIP, text_config={"model_type": "llama", **_TEXT}
    ),
    "Gemma3ForConditionalGeneration": lambda: tf.Gemma3Config(
        vision_config=_SIGLIP, text_config={"head_dim": 16, **_TEXT}
    ),
    "PaliGemmaForConditionalGeneration": lambda: tf.PaliGemmaConfig(
        vision_config={**_SIGLIP, "projection_dim": 64},
        text_config={"model_type": "gemma", "head_dim": 16, **_TEXT},
    ),
    "Idefics3ForConditionalGeneration": lambda: tf.Idefics3Config(
        vision_config=_VISION, text_config={"model_type": "llama", **_TEXT}
    ),
    "SmolVLMForConditionalGeneration": lambda: tf.SmolVLMConfig(
        vision_config=_VISION, text_config={"model_type": "llama", **_TEXT}
    ),
    "InternVLForConditionalGeneration": lambda: tf.InternVLConfig(
        vision_config=_INTERN, text_config={"model_type": "qwen2", **_TEXT}
    ),
    "LlamaForCausalLM": tiny.llama_config,
    "Qwen3ForCausalLM": lambda: tf.Qwen3Config(head_dim=16, **_TEXT),
}


@cache
def tree(architecture: str) -> nn.Module:
    """The model of that architecture, without weights."""
    config = CONFIGS[architecture]()
    config.architectures = [architecture]
    return meta_model(config, "bfloat16")


@cache
def inventory(architecture: str) -> Inventory:
    """Its linears."""
    return list_layers(tree(architecture), FormatSpec())
