"""Idefics3 and SmolVLM, one architecture under two class names: a SigLIP tower, a connector, a decoder."""

from __future__ import annotations

from qprobe.models.entry import OPEN, on_the_hub
from qprobe.models.family import LANGUAGE, PROJECTOR, VISION, Family
from qprobe.models.published import llm_compressor, unsloth_loader

_IDEFICS3, _SMOLVLM = "Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"
_SMOLVLM2 = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
_PUBLISHED = (
    unsloth_loader("modality_projection"),
    llm_compressor("idefics3_example.py", "vision_model", "connector"),
)

FAMILY = Family(
    architectures=(_IDEFICS3, _SMOLVLM),
    towers=(
        (VISION, r"^model\.vision_model\."),
        (PROJECTOR, r"^model\.connector\."),
        (LANGUAGE, r"^(model\.text_model\.|lm_head$)"),
    ),
    entries=(
        *on_the_hub(
            _IDEFICS3,
            OPEN,
            ("idefics3-8b", "HuggingFaceM4/Idefics3-8B-Llama3", "idefics3-8b"),
            published=_PUBLISHED,
        ),
        # No plain "smolvlm": it would have to be the first SmolVLM-Instruct, which is another checkpoint.
        *on_the_hub(
            _SMOLVLM,
            OPEN,
            ("smolvlm2", _SMOLVLM2, "smolvlm2-2.2b"),
            ("smolvlm2-2.2b", _SMOLVLM2, "smolvlm2-2.2b"),
            published=_PUBLISHED,
        ),
        *on_the_hub(
            _IDEFICS3,
            OPEN,
            ("smolvlm-500m", "HuggingFaceTB/SmolVLM-500M-Instruct", "smolvlm-500m"),
            ("smolvlm-256m", "HuggingFaceTB/SmolVLM-256M-Instruct", "smolvlm-256m"),
            published=_PUBLISHED,
        ),
    ),
)
