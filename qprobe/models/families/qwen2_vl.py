"""Qwen2-VL: images of any size, whose patches a merger joins in blocks of 2 x 2."""

from __future__ import annotations

from qprobe.models.entry import OPEN, PublishedSize, on_the_hub
from qprobe.models.family import MERGER, VLLM_FUSED, Engine, Family
from qprobe.models.grid import grid_of_thw
from qprobe.models.published import unsloth_loader

_QWEN2_VL = "Qwen2VLForConditionalGeneration"
_BLOG = "https://unsloth.ai/blog/dynamic-4bit"
_2B = "qwen2-vl-2b"

FAMILY = Family(
    architectures=(_QWEN2_VL,),
    towers=MERGER,
    image_grid=grid_of_thw,
    engines={
        # vLLM 0.19.1, models/qwen2_vl.py, `hf_to_vllm_mapper`.
        "vllm": Engine(
            VLLM_FUSED,
            renames=(
                (r"^model\.(?!visual\.)", "language_model.model."),
                (r"^lm_head$", "language_model.lm_head"),
            ),
        )
    },
    entries=(
        *on_the_hub(
            _QWEN2_VL,
            OPEN,
            (_2B, "Qwen/Qwen2-VL-2B", _2B),
            ("qwen2-vl-2b-instruct", "Qwen/Qwen2-VL-2B-Instruct", _2B),
            published=(unsloth_loader("visual"),),
            sizes=(
                PublishedSize("16-bit", 4.11, _BLOG),
                PublishedSize("nf4", 1.36, _BLOG),
                PublishedSize("unsloth", 1.81, _BLOG),
            ),
        ),
        *on_the_hub(
            _QWEN2_VL,
            OPEN,
            ("qwen2-vl-7b", "Qwen/Qwen2-VL-7B", "qwen2-vl-7b"),
            ("qwen2-vl-7b-instruct", "Qwen/Qwen2-VL-7B-Instruct", "qwen2-vl-7b"),
            ("qwen2-vl-72b", "Qwen/Qwen2-VL-72B", "qwen2-vl-72b"),
            ("qwen2-vl-72b-instruct", "Qwen/Qwen2-VL-72B-Instruct", "qwen2-vl-72b"),
            published=(unsloth_loader("visual"),),
        ),
    ),
)
