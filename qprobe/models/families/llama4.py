"""Llama 4 with vision: every layer has experts, whose weights lie transposed, and one shared expert."""

from __future__ import annotations

from qprobe.models.entry import GATED, on_the_hub
from qprobe.models.family import LANGUAGE, PROJECTOR, VISION, Family
from qprobe.models.published import llm_compressor

FAMILY = Family(
    architectures=("Llama4ForConditionalGeneration",),
    towers=(
        (VISION, r"^vision_model\."),
        (PROJECTOR, r"^multi_modal_projector\."),
        (LANGUAGE, r"^language_model\."),
    ),
    entries=on_the_hub(
        "Llama4ForConditionalGeneration",
        GATED,
        ("llama-4-scout", "meta-llama/Llama-4-Scout-17B-16E", "llama-4-scout"),
        ("llama-4-scout-instruct", "meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout"),
        published=(
            llm_compressor("llama4_example.py", "self_attn", "vision_model", "multi_modal_projector"),
        ),
    ),
)
