"""Qwen3-VL with experts: as Qwen2-VL, with further mergers that hand deeper features to the decoder."""

from __future__ import annotations

from qprobe.models.entry import OPEN, on_the_hub
from qprobe.models.family import LANGUAGE, PROJECTOR, VISION, VLLM_FUSED, Engine, Family
from qprobe.models.grid import grid_of_thw
from qprobe.models.published import unsloth_loader

FAMILY = Family(
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    towers=(
        (PROJECTOR, r"^model\.visual\.(merger|deepstack_merger_list)\."),
        (VISION, r"^model\.visual\.(?!merger\.|deepstack_merger_list\.)"),
        (LANGUAGE, r"^(model\.language_model\.|lm_head$)"),
    ),
    image_grid=grid_of_thw,
    engines={
        # vLLM 0.19.1, models/qwen3_vl.py, `hf_to_vllm_mapper`.
        "vllm": Engine(
            VLLM_FUSED,
            renames=(
                (r"^model\.visual\.", "visual."),
                (r"^model\.language_model\.", "language_model.model."),
                (r"^lm_head$", "language_model.lm_head"),
            ),
        )
    },
    # Only tuned weights were published, so the short name means those that follow instructions.
    entries=on_the_hub(
        "Qwen3VLMoeForConditionalGeneration",
        OPEN,
        *(
            (alias, "Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3-vl-30b-a3b")
            for alias in ("qwen3-vl-30b-a3b", "qwen3-vl-30b-a3b-instruct")
        ),
        published=(unsloth_loader("visual"),),
    ),
)
