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
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tests import families, sequences, tiny
from tests.benchmarks.architecture_matrix.texts import ENCODER, HEAD_16, SEQUENCES, config_of
from tests.families import SIDE
from tests.tiny import IDS, VOCAB, Recipe

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


SEEING_KIN = (
    "CLIPModel", "SiglipModel", "Siglip2Model", "Qwen3VLMoeForConditionalGeneration", "GitForCausalLM",
    "Kosmos2ForConditionalGeneration", "InstructBlipForConditionalGeneration",
)  # fmt: skip


def pair(text: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config of a tower for images beside one for text."""
    return {"text_config": {**ENCODER, **(text or {})}, "vision_config": VISION, "projection_dim": 32}


def clip_processor() -> tuple[Any, ...]:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return (transformers.CLIPProcessor(images, tiny.make_tokenizer(())),)


def siglip_processor() -> tuple[Any, ...]:
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return (transformers.SiglipProcessor(images, tiny.make_tokenizer(())),)


def siglip2_processor() -> tuple[Any, ...]:
    return (transformers.Siglip2Processor(Siglip2ImageProcessorPil(), tiny.make_tokenizer(())),)


def siglip2() -> dict[str, Any]:
    """Images of their own aspect, in patches of 16 pixels: its processor takes no others."""
    vision = {key: value for key, value in VISION.items() if key != "image_size"}
    return {
        "text_config": {**ENCODER, "max_position_embeddings": 64},
        "vision_config": {**vision, "num_patches": 16, "patch_size": 16},
    }


def _clip_images() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def git_processor() -> tuple[Any, ...]:
    return (transformers.GitProcessor(_clip_images(), tiny.make_tokenizer(())),)


def kosmos2() -> dict[str, Any]:
    text = {
        "vocab_size": VOCAB + 16, "embed_dim": 64, "layers": 2, "ffn_dim": 96, "attention_heads": 4,
        "max_position_embeddings": 512, **IDS,
    }  # fmt: skip
    return {"text_config": text, "vision_config": VISION}  # its processor writes 64 tokens for an image


def kosmos2_processor() -> tuple[Any, ...]:
    tokenizer = tiny.make_tokenizer(())
    return (transformers.Kosmos2Processor(_clip_images(), tokenizer, num_patch_index_tokens=4),)


def instruct_blip() -> dict[str, Any]:
    qformer = {key: VISION[key] for key in VISION if key not in ("image_size", "patch_size")}
    given = sequences.blip2_opt().to_dict()
    return {
        "vision_config": VISION,
        "qformer_config": {
            **qformer,
            "vocab_size": VOCAB,
            "encoder_hidden_size": 64,
            "pad_token_id": tiny.PAD,
        },
        "text_config": given["text_config"],
        "num_query_tokens": sequences.QUERIES,
        "image_token_index": tiny.FIRST_MARKER,
    }


def instruct_blip_processor() -> tuple[Any, ...]:
    ((blip2,), queries) = sequences.blip2_processor("<|bos|> $A"), tiny.make_tokenizer(())
    return (
        transformers.InstructBlipProcessor(
            blip2.image_processor, blip2.tokenizer, queries, num_query_tokens=sequences.QUERIES
        ),
    )


def qwen2_audio() -> dict[str, Any]:
    """Read as a model of text, which it takes without a sound."""
    audio = {
        "model_type": "qwen2_audio_encoder", "num_mel_bins": 16, "encoder_layers": 1, "d_model": 64,
        "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "max_source_positions": 64,
    }  # fmt: skip
    text = {"model_type": "qwen2", **tiny.decoder(64, 96, 2)}
    return {"audio_config": audio, "text_config": text, "audio_token_index": 10}


def moshi() -> dict[str, Any]:
    depth = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 96}
    sound = {
        "model_type": "mimi", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "num_filters": 4, "codebook_size": 64, "codebook_dim": 16,
        "vector_quantization_hidden_dimension": 16, "num_quantizers": 4, "upsample_groups": 32,
    }  # fmt: skip
    books = {"num_codebooks": 2, "vocab_size": VOCAB}
    return {
        **tiny.decoder(64, 96, 2), **books, "ffn_dim": 192, "depth_decoder_config": {**depth, **books},
        "audio_encoder_config": sound,
    }  # fmt: skip


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
        "Siglip2Model": (siglip2(), siglip2_processor),
        "Kosmos2ForConditionalGeneration": (kosmos2(), kosmos2_processor),
        "GitForCausalLM": ({**ENCODER, "vision_config": VISION}, git_processor),
        "InstructBlipForConditionalGeneration": (instruct_blip(), instruct_blip_processor),
        "Qwen2AudioForConditionalGeneration": (qwen2_audio(), tiny.text_tokenizer),
        "MoshiForConditionalGeneration": (moshi(), tiny.text_tokenizer),
        "DINOv3ViTModel": (VISION, _images_alone),
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
        or name in SEEING_KIN
    )
