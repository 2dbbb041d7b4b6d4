"""Processors of the vision-language families of transformers, made in code: tiny images, a small tokenizer.

Each is the family's own processor class with its own marks; nothing is downloaded and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from transformers import ProcessorMixin

from tests import tiny

SIDE = 28
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"


class Recipe(NamedTuple):
    """How a processor is made.

    module, name: of its class; images: of its image processor's class, with options. mark: an image in the
    text. tokens: attributes of the tokenizer that hold marks; markers: further special tokens.
    """

    module: str
    name: str
    images: str
    image_options: dict[str, Any]
    mark: str
    tokens: dict[str, str]
    markers: tuple[str, ...]
    options: dict[str, Any]


def _recipe(
    module: str,
    name: str,
    images: str,
    image_options: dict[str, Any],
    mark: str,
    tokens: dict[str, str] | None = None,
    markers: tuple[str, ...] = (),
    **options: Any,
) -> Recipe:
    return Recipe(module, name, images, image_options, mark, tokens or {}, markers, options)


_SQUARE = {"height": SIDE, "width": SIDE}
_PATCHES = {"size": {"shortest_edge": 28 * 28, "longest_edge": 6 * 28 * 28}}
_QWEN3 = {"size": {"shortest_edge": 32 * 32, "longest_edge": 6 * 32 * 32}, "patch_size": 16}
_PIXTRAL = {"size": {"longest_edge": 42}, "patch_size": {"height": 14, "width": 14}}
_TILES = {"size": _SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 3}
_PINPOINTS = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
_LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_CLIP = {"size": {"shortest_edge": SIDE}, "crop_size": _SQUARE}
_IDEFICS = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": SIDE}}
_IDEFICS_MARKS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
_AYA_MARKS = (
    "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE",
    "TILE_GLOBAL",
)  # fmt: skip

RECIPES = {
    "mllama": _recipe(
        "mllama", "MllamaProcessor", "mllama.MllamaImageProcessorPil",
        {"size": _SQUARE, "max_image_tiles": 2}, "<|image|>", markers=("<|image|>",),
    ),
    "qwen2_vl": _recipe(
        "qwen2_vl", "Qwen2VLProcessor", "qwen2_vl.Qwen2VLImageProcessorPil", _PATCHES, QWEN,
        markers=tiny.QWEN_MARKERS,
    ),
    "qwen2_5_vl": _recipe(
        "qwen2_5_vl", "Qwen2_5_VLProcessor", "qwen2_vl.Qwen2VLImageProcessorPil", _PATCHES, QWEN,
        markers=tiny.QWEN_MARKERS,
    ),
    "qwen3_vl": _recipe(
        "qwen3_vl", "Qwen3VLProcessor", "qwen2_vl.Qwen2VLImageProcessorPil", _QWEN3, QWEN,
        markers=tiny.QWEN_MARKERS,
    ),
    "glm4v": _recipe(
        "glm4v", "Glm4vProcessor", "glm4v.Glm4vImageProcessorPil", _PATCHES,
        "<|begin_of_image|><|image|><|end_of_image|>",
        markers=("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>",
                 "<|end_of_video|>"),
    ),
    "llava": _recipe(
        "llava", "LlavaProcessor", "clip.CLIPImageProcessorPil", _CLIP, "<image>", markers=("<image>",),
        **_LLAVA,
    ),
    "llava_next": _recipe(
        "llava_next", "LlavaNextProcessor", "llava_next.LlavaNextImageProcessorPil", {**_CLIP, **_PINPOINTS},
        "<image>", markers=("<image>",), **_LLAVA,
    ),
    "llava_onevision": _recipe(
        "llava_onevision", "LlavaOnevisionProcessor", "llava_onevision.LlavaOnevisionImageProcessorPil",
        {"size": _SQUARE, **_PINPOINTS}, "<image>", markers=("<image>", "<video>"), num_image_tokens=4,
        vision_feature_select_strategy="full",
    ),
    "llava_pixtral": _recipe(
        "llava", "LlavaProcessor", "pixtral.PixtralImageProcessorPil", _PIXTRAL, "[IMG]", markers=("[IMG]",),
        patch_size=14, vision_feature_select_strategy="full", image_token="[IMG]",
    ),
    "gemma3": _recipe(
        "gemma3", "Gemma3Processor", "gemma3.Gemma3ImageProcessorPil", {"size": _SQUARE}, "<start_of_image>",
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        image_seq_length=4,
    ),
    "gemma4": _recipe(
        "gemma4", "Gemma4Processor", "gemma4.Gemma4ImageProcessorPil",
        {"patch_size": 14, "max_soft_tokens": 70, "pooling_kernel_size": 1}, "<|image|>",
        {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<|image|>", "audio_token": "<|audio|>",
         "boa_token": "<boa>", "eoa_token": "<eoa>"},
        feature_extractor=None, video_processor=None,
    ),
    "paligemma": _recipe(
        "paligemma", "PaliGemmaProcessor", "siglip.SiglipImageProcessorPil",
        {"size": _SQUARE, "image_seq_length": 4}, "<image>", {"image_token": "<image>"},
    ),
    "idefics3": _recipe(
        "idefics3", "Idefics3Processor", "idefics3.Idefics3ImageProcessorPil", _IDEFICS, "<image>",
        markers=_IDEFICS_MARKS, image_seq_len=4,
    ),
    "smolvlm": _recipe(
        "smolvlm", "SmolVLMProcessor", "smolvlm.SmolVLMImageProcessorPil", _IDEFICS, "<image>",
        markers=_IDEFICS_MARKS, image_seq_len=4, video_processor=None,
    ),
    "internvl": _recipe(
        "internvl", "InternVLProcessor", "got_ocr2.GotOcr2ImageProcessorPil", _TILES, "<IMG_CONTEXT>",
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
         "video_token": "<video>"},
        image_seq_length=4,
    ),
    "aya_vision": _recipe(
        "aya_vision", "AyaVisionProcessor", "got_ocr2.GotOcr2ImageProcessorPil", _TILES, "<image>",
        markers=_AYA_MARKS, patch_size=14, img_size=SIDE,
    ),
}  # fmt: skip


@cache
def processor_of(family: str) -> Any:
    """The processor, with a chat template; shared by all tests, which must not change it."""
    return make_processor(family)


def make_processor(family: str) -> Any:
    """A processor of its own."""
    recipe = RECIPES[family]
    tokenizer = tiny.make_tokenizer(
        tuple(dict.fromkeys((*recipe.tokens.values(), *recipe.markers))),
        extra_special_tokens=recipe.tokens,
    )
    where, _, name = recipe.images.rpartition(".")
    images = _class(where, "image_processing", name)(**recipe.image_options)
    full = _class(recipe.module, "processing", recipe.name)
    return _images_only(full)(
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=tiny.chat_template(recipe.mark),
        **recipe.options,
    )


def _class(module: str, kind: str, name: str) -> Any:
    pil = "pil_" if name.endswith("Pil") else ""
    return getattr(import_module(f"transformers.models.{module}.{kind}_{pil}{module}"), name)


def _images_only(full: Any) -> Callable[..., Any]:
    """The class without its video half, which needs torchvision."""

    def check(self: Any, name: str, argument: Any) -> Any:
        missing = argument is None and name != "image_processor"
        return None if missing else full.check_argument_for_proper_class(self, name, argument)

    # As `qprobe.loading.processor` makes it.
    plain = ProcessorMixin.apply_chat_template
    return type(
        full.__name__, (full,), {"check_argument_for_proper_class": check, "apply_chat_template": plain}
    )
