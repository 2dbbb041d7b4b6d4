"""Llama 3.2 Vision: a vision tower of tiles, whose states the decoder reads by cross-attention."""

from __future__ import annotations

from qprobe.models.entry import GATED, PublishedList, PublishedSize, on_the_hub
from qprobe.models.family import CROSS, LANGUAGE, PROJECTOR, VISION, VLLM_FUSED, Engine, Family
from qprobe.models.published import llm_compressor

_MLLAMA = "MllamaForConditionalGeneration"
_11B = "meta-llama/Llama-3.2-11B-Vision-Instruct"
_BLOG = "https://unsloth.ai/blog/dynamic-4bit"

UNSLOTH_LLAMA_11B = PublishedList(
    author="unsloth",
    source="config.json of unsloth/Llama-3.2-11B-Vision-Instruct-unsloth-bnb-4bit",
    entries=(
        "lm_head",
        "multi_modal_projector",
        "merger",
        "modality_projection",
        "language_model.model.layers.1.self_attn",
        "language_model.model.layers.1.mlp",
        "vision_model.transformer.layers.13.mlp.fc2",
        *(f"language_model.model.layers.{i}.cross_attn.o_proj" for i in (8, 13, 18, 23, 28, 33, 38)),
        "language_model.model.layers.13.mlp.down_proj",
        "language_model.model.layers.18.mlp.down_proj",
    ),
)
_VISION_KEPT = llm_compressor("mllama_example.py", "multi_modal_projector", "vision_model")

FAMILY = Family(
    architectures=(_MLLAMA,),
    towers=(
        (VISION, r"^model\.vision_model\."),
        (PROJECTOR, r"^model\.multi_modal_projector(\.|$)"),
        (CROSS, r"^model\.language_model\.layers\.\d+\.cross_attn\."),
        (LANGUAGE, r"^(model\.language_model\.(?!layers\.\d+\.cross_attn\.)|lm_head$)"),
    ),
    vision_inputs=r"\.cross_attn\.[kv]_proj$",
    engines={"vllm": Engine(VLLM_FUSED, dropped="0.11")},
    entries=(
        # The figures and the list published for "Llama 3.2 11B Vision" are those of the instruction-tuned
        # model, so the short name means it. The base model has smaller tiles (448 pixels) and 27 M
        # parameters less.
        *on_the_hub(
            _MLLAMA,
            GATED,
            ("llama-3.2-11b-vision", _11B, "llama-3.2-11b-vision"),
            ("llama-3.2-11b-vision-instruct", _11B, "llama-3.2-11b-vision"),
            published=(UNSLOTH_LLAMA_11B, _VISION_KEPT),
            sizes=(
                PublishedSize("16-bit", 19.87, _BLOG),
                PublishedSize("nf4", 6.54, _BLOG),
                PublishedSize("unsloth", 7.23, _BLOG),
            ),
        ),
        *on_the_hub(
            _MLLAMA,
            GATED,
            ("llama-3.2-11b-vision-base", "meta-llama/Llama-3.2-11B-Vision", "llama-3.2-11b-vision-448"),
            published=(UNSLOTH_LLAMA_11B, _VISION_KEPT),
        ),
        *on_the_hub(
            _MLLAMA,
            GATED,
            ("llama-3.2-90b-vision", "meta-llama/Llama-3.2-90B-Vision", "llama-3.2-90b-vision"),
            (
                "llama-3.2-90b-vision-instruct",
                "meta-llama/Llama-3.2-90B-Vision-Instruct",
                "llama-3.2-90b-vision",
            ),
        ),
    ),
)
