"""Models that read text only: Llama and Qwen3, also with experts."""

from __future__ import annotations

from qprobe.models.entry import GATED, OPEN, on_the_hub
from qprobe.models.family import LANGUAGE, Family

FAMILY = Family(
    architectures=("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    towers=((LANGUAGE, r"^"),),
    entries=(
        *on_the_hub(
            "LlamaForCausalLM",
            GATED,
            ("llama-3.2-1b", "meta-llama/Llama-3.2-1B", "llama-3.2-1b"),
            ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
            ("llama-3.2-3b", "meta-llama/Llama-3.2-3B", "llama-3.2-3b"),
            ("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b"),
            ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
            ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ),
        *on_the_hub(
            "Qwen3ForCausalLM",
            OPEN,
            *(
                (f"qwen3-{size}", f"Qwen/Qwen3-{size.upper()}", f"qwen3-{size}")
                for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")
            ),
        ),
        *on_the_hub("Qwen3MoeForCausalLM", OPEN, ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b")),
    ),
)
