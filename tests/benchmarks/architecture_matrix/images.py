"""Tiny models that read images: vision-language families with their processors, CLIP and its kin."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests import families, sequences, tiny
from tests.benchmarks.architecture_matrix.texts import ENCODER, HEAD_16, SEQUENCES, config_of
from tests.families import SIDE
from tests.tiny import IDS, Recipe

VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 2, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 96, "num_heads": 4,
    "patch_size": 16, "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
GLM_VISION = {
    "depth": 2, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 96, "num_heads": 4,
    "patch_size": 14, "image_size": 56,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def _id(family: str, token: str) -> int:
    return families.processor_of(family).tokenizer.convert_tokens_to_ids(token)


def _text(family: str, **more: Any) -> dict[str, Any]:
    size = len(families.processor_of(family).tokenizer)
    return {**tiny.decoder(64, 96, 2), "vocab_size": size, **more}


def _llava(family: str, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    image = {"image_token_index": _id(family, "<image>"), "image_token_id": _id(family, "<image>")}
    return {
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "text_config": text,
        **image,
        **more,
    }


def llava() -> dict[str, Any]:
    return _llava("llava", {"model_type": "llama", **_text("llava")}, vision_feature_layer=-1)


def llava_next() -> dict[str, Any]:
    text = {"model_type": "mistral", **_text("llava_next", **HEAD_16)}
    return _llava("llava_next", text, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1)


def llava_onevision() -> dict[str, Any]:
    text = {"model_type": "qwen2", **_text("llava_onevision")}
    return {
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "text_config": text,
        "image_token_id": _id("llava_onevision", "<image>"),
        "image_token_index": _id("llava_onevision", "<image>"),
        "video_token_id": _id("llava_onevision", "<video>"),
        "video_token_index": _id("llava_onevision", "<video>"),
        "image_grid_pinpoints": PINPOINTS,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    }


def gemma3() -> dict[str, Any]:
    return {
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        "text_config": {
            "model_type": "gemma3_text", **_text("gemma3", **HEAD_16, query_pre_attn_scalar=16),
        },
        "mm_tokens_per_image": 4,
        "image_token_id": _id("gemma3", "<image_soft_token>"),
        "image_token_index": _id("gemma3", "<image_soft_token>"),
        "boi_token_index": _id("gemma3", "<start_of_image>"),
        "eoi_token_index": _id("gemma3", "<end_of_image>"),
    }  # fmt: skip


def paligemma() -> dict[str, Any]:
    return {
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        "text_config": {"model_type": "gemma", **_text("paligemma", **HEAD_16)},
        "image_token_index": _id("paligemma", "<image>"),
        "image_token_id": _id("paligemma", "<image>"),
        "projection_dim": 64,
    }


def idefics3(family: str) -> dict[str, Any]:
    kind = "idefics3_vision" if family == "idefics3" else "smolvlm_vision"
    return {
        "vision_config": {"model_type": kind, **VISION, "patch_size": 7},
        "text_config": {"model_type": "llama", **_text(family)},
        "image_token_id": _id(family, "<image>"),
        "scale_factor": 2,
    }


def internvl() -> dict[str, Any]:
    return {
        "vision_config": {
            "model_type": "internvl_vision", **VISION, "image_size": [SIDE, SIDE], "patch_size": [7, 7],
        },
        "text_config": {"model_type": "qwen2", **_text("internvl")},
        "image_token_id": _id("internvl", "<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
    }  # fmt: skip


def aya_vision() -> dict[str, Any]:
    return {
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "patch_size": 7},
        "text_config": {"model_type": "cohere2", **_text("aya_vision")},
        "image_token_index": _id("aya_vision", "<|IMG_PATCH|>"),
        "image_token_id": _id("aya_vision", "<|IMG_PATCH|>"),
        "downsample_factor": 2,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    }


def qwen3_vl() -> dict[str, Any]:
    text = {**_text("qwen3_vl", **HEAD_16), "rope_parameters": MROPE}
    return {"text_config": text, "vision_config": QWEN_VISION, **tiny.qwen_markers()}


def glm4v() -> dict[str, Any]:
    named = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    return {
        "text_config": {**_text("glm4v"), "rope_parameters": MROPE},
        "vision_config": GLM_VISION,
        **{key: _id("glm4v", token) for key, token in named.items()},
    }


def glm4v_moe() -> dict[str, Any]:
    text = {
        "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, **HEAD_16,
    }  # fmt: skip
    config = glm4v()
    rope = {**MROPE, "mrope_section": [1, 1, 2]}  # half of each head is turned
    return {**config, "text_config": {**config["text_config"], **text, "rope_parameters": rope}}


FAMILIES: dict[str, tuple[str, str, Callable[[], dict[str, Any]]]] = {
    "LLaVA 1.5": ("LlavaForConditionalGeneration", "llava", llava),
    "LlavaNextForConditionalGeneration": ("", "llava_next", llava_next),
    "LlavaOnevisionForConditionalGeneration": ("", "llava_onevision", llava_onevision),
    "Gemma3ForConditionalGeneration": ("", "gemma3", gemma3),
    "PaliGemmaForConditionalGeneration": ("", "paligemma", paligemma),
    "Idefics3ForConditionalGeneration": ("", "idefics3", partial(idefics3, "idefics3")),
    "SmolVLMForConditionalGeneration": ("", "smolvlm", partial(idefics3, "smolvlm")),
    "InternVLForConditionalGeneration": ("", "internvl", internvl),
    "AyaVisionForConditionalGeneration": ("", "aya_vision", aya_vision),
    "Qwen3VLForConditionalGeneration": ("", "qwen3_vl", qwen3_vl),
    "Glm4vForConditionalGeneration": ("", "glm4v", glm4v),
    "Glm4vMoeForConditionalGeneration": ("", "glm4v", glm4v_moe),
}
TINY = {
    "MllamaForConditionalGeneration": "mllama",
    "Qwen2VLForConditionalGeneration, tied": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "LlavaForConditionalGeneration, Pixtral": "llava_pixtral",
}


WRITING_IMAGES = {  # processors that write the tokens of an image themselves
    "Florence2ForConditionalGeneration": "florence2",
    "Blip2ForConditionalGeneration, T5": "blip2_t5",
    "Blip2ForConditionalGeneration, OPT": "blip2_opt",
}
SEEING_ALONE = {  # encoders of an image alone
    "VisionEncoderDecoderModel, Donut": "donut",
    "VisionEncoderDecoderModel, TrOCR": "trocr",
    "Pix2StructForConditionalGeneration": "pix2struct",
}


def pair(text: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config of a tower for images beside one for text."""
    return {"text_config": {**ENCODER, **(text or {})}, "vision_config": VISION, "projection_dim": 32}


def clip_processor() -> tuple[Any, ...]:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return (transformers.CLIPProcessor(images, tiny.make_tokenizer(())),)


def siglip_processor() -> tuple[Any, ...]:
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return (transformers.SiglipProcessor(images, tiny.make_tokenizer(())),)


def _images_alone() -> tuple[Any, ...]:
    return (SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),)


def _whisper() -> dict[str, Any]:
    return {**SEQUENCES, "num_mel_bins": 16, "max_source_positions": 64, "max_target_positions": 64, **IDS}


def recipes() -> dict[str, Recipe]:
    """Recipes by name, which is the class's unless one class is there twice."""
    found = {name: tiny.RECIPES[key] for name, key in TINY.items()}
    found |= {name: sequences.RECIPES[key] for name, key in {**WRITING_IMAGES, **SEEING_ALONE}.items()}
    for name, (architecture, family, config) in FAMILIES.items():
        found[name] = _of_family(architecture or name, family, config)
    kin: dict[str, tuple[dict[str, Any], Callable[[], tuple[Any, ...]]]] = {
        "CLIPModel": (pair(), clip_processor),
        "SiglipModel": (pair({"max_position_embeddings": 64}), siglip_processor),
        "CLIPTextModelWithProjection": ({**ENCODER, "projection_dim": 32}, tiny.encoder_tokenizer),
        "ViTForImageClassification": ({**VISION, "num_labels": 3}, _images_alone),
        "WhisperForConditionalGeneration": (_whisper(), tiny.text_tokenizer),
    }
    for name, (given, processor) in kin.items():
        found[name] = Recipe(name, partial(config_of, name, given), processor)
    return found


def _of_family(architecture: str, family: str, config: Callable[[], dict[str, Any]]) -> Recipe:
    return Recipe(
        architecture,
        lambda: config_of(architecture, {**config(), **IDS}),
        lambda: (Parts(family),),
    )


class Parts:
    """The processor of `family` as the files that a hub's folder holds, without those for videos.

    A processor that lacks a half, as it does where torchvision is not installed, cannot save itself.
    """

    def __init__(self, family: str) -> None:
        self._family = family

    def save_pretrained(self, folder: Path) -> None:
        """Writes tokenizer, image processor, and what joins them."""
        recipe, processor = families.RECIPES[self._family], families.make_processor(self._family)
        processor.tokenizer.chat_template = processor.chat_template
        processor.tokenizer.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
        options = {key: value for key, value in recipe.options.items() if value is not None}
        joined = {"processor_class": recipe.name, **options}
        (folder / "processor_config.json").write_text(json.dumps(joined))


def reads_images(name: str) -> bool:
    """True if the samples of the model `name` bring a picture."""
    return (
        name in TINY
        or name in FAMILIES
        or name in WRITING_IMAGES
        or name in SEEING_ALONE
        or name in ("CLIPModel", "SiglipModel", "Qwen3VLMoeForConditionalGeneration")
    )
