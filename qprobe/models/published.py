"""Skip-lists that tools hold in their own source; a family passes the entries that name its modules."""

from __future__ import annotations

from qprobe.models.entry import PublishedList


def unsloth_loader(*entries: str) -> PublishedList:
    """What Unsloth leaves in 16-bit of any model that it quantizes itself, beside its uploaded lists.

    AutoAWQ 0.2.9 (`modules_to_not_convert`) leaves the same part of Qwen-VL, and the examples of
    llm-compressor 0.14.0.1 the same parts of Qwen-VL, LLaVA, Pixtral, Gemma 3 and InternVL.
    """
    return PublishedList(
        author="unsloth-loader",
        source="SKIP_QUANTIZATION_MODULES in peft_utils.py of unsloth_zoo 2026.10.9",
        entries=("lm_head", *entries),
    )


def llm_compressor(example: str, *entries: str) -> PublishedList:
    """What the example of llm-compressor leaves in 16-bit, where that differs from `unsloth_loader`."""
    return PublishedList(
        author="llm-compressor",
        source=f"examples/multimodal_vision/{example} of llm-compressor 0.14.0.1",
        entries=("lm_head", *entries),
    )
