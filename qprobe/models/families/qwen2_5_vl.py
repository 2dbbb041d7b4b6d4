"""Qwen2.5-VL: as Qwen2-VL, with gated linears in the vision tower."""

from __future__ import annotations

from qprobe.models.entry import OPEN, PublishedList, on_the_hub
from qprobe.models.family import MERGER, VLLM_FUSED, Engine, Family
from qprobe.models.grid import grid_of_thw
from qprobe.models.published import unsloth_loader

_QWEN2_5_VL = "Qwen2_5_VLForConditionalGeneration"
_ATTENTION, _MLP = (0, 1, 2, 3, 4, 7, 14, 15), (0, 1, 2, 3, 5, 7, 8, 10, 12, 13, 14, 15, 17)

VECTORDB_QWEN_3B = PublishedList(
    author="vectordb-plugin",
    source="llm_int8_skip_modules in modules/process_images.py of github.com/BBC-Esq/VectorDB-Plugin",
    entries=(
        "lm_head",
        "merger",
        *(f"visual.blocks.{i}.attn" for i in _ATTENTION),
        *(f"visual.blocks.{i}.mlp" for i in _MLP),
        "visual.blocks.31.mlp.down_proj",
    ),
)
_LOADER = unsloth_loader("visual")

FAMILY = Family(
    architectures=(_QWEN2_5_VL,),
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
    entries=(
        *on_the_hub(
            _QWEN2_5_VL,
            OPEN,
            ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-3b"),
            ("qwen2.5-vl-3b-instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-3b"),
            published=(VECTORDB_QWEN_3B, _LOADER),
        ),
        *on_the_hub(
            _QWEN2_5_VL,
            OPEN,
            ("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b"),
            ("qwen2.5-vl-7b-instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b"),
            ("qwen2.5-vl-32b", "Qwen/Qwen2.5-VL-32B-Instruct", "qwen2.5-vl-32b"),
            ("qwen2.5-vl-32b-instruct", "Qwen/Qwen2.5-VL-32B-Instruct", "qwen2.5-vl-32b"),
            ("qwen2.5-vl-72b", "Qwen/Qwen2.5-VL-72B-Instruct", "qwen2.5-vl-72b"),
            ("qwen2.5-vl-72b-instruct", "Qwen/Qwen2.5-VL-72B-Instruct", "qwen2.5-vl-72b"),
            published=(_LOADER,),
        ),
    ),
)
