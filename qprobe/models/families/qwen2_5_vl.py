"""Qwen2.5-VL: as Qwen2-VL, with gated linears in the vision tower."""

from __future__ import annotations

from qprobe.models.entry import OPEN, on_the_hub
from qprobe.models.family import MERGER, VLLM_FUSED, Engine, Family
from qprobe.models.grid import grid_of_thw

FAMILY = Family(
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    towers=MERGER,
    image_grid=grid_of_thw,
    engines={
        # vLLM 0.19.1, models/qwen2_5_vl.py, `hf_to_vllm_mapper`.
        "vllm": Engine(
            VLLM_FUSED,
            renames=(
                (r"^model\.(?!visual\.)", "language_model.model."),
                (r"^lm_head$", "language_model.lm_head"),
            ),
        )
    },
    # Only instruction-tuned weights of Qwen2.5-VL were published, so the short name means those.
    entries=on_the_hub(
        "Qwen2_5_VLForConditionalGeneration",
        OPEN,
        ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-3b"),
        ("qwen2.5-vl-3b-instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-3b"),
        ("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b"),
        ("qwen2.5-vl-7b-instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b"),
        ("qwen2.5-vl-32b", "Qwen/Qwen2.5-VL-32B-Instruct", "qwen2.5-vl-32b"),
        ("qwen2.5-vl-32b-instruct", "Qwen/Qwen2.5-VL-32B-Instruct", "qwen2.5-vl-32b"),
        ("qwen2.5-vl-72b", "Qwen/Qwen2.5-VL-72B-Instruct", "qwen2.5-vl-72b"),
        ("qwen2.5-vl-72b-instruct", "Qwen/Qwen2.5-VL-72B-Instruct", "qwen2.5-vl-72b"),
    ),
)
