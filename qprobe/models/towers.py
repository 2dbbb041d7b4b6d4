"""Towers and fused groups of the architectures we know, as literal data.

A tower is the first pattern that `re.search` finds in a module name. An architecture that is not
listed is guessed from the same words that all of them use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

VISION, PROJECTOR, CROSS, LANGUAGE, OTHER = "vision", "projector", "cross_attention", "language", "other"


@dataclass(frozen=True)
class Layout:
    """Towers of one architecture: (tower, pattern) in order of precedence.

    vision_inputs: pattern of layers outside the vision tower that read vision tokens.
    """

    towers: tuple[tuple[str, str], ...]
    vision_inputs: str | None = None


# Words that vision-language models in transformers use for their parts; order matters, because a
# projector often sits inside the vision module ("visual.merger").
GENERIC = Layout(
    towers=(
        (PROJECTOR, r"(^|\.)(multi_modal_projector|mm_projector|projector|merger|connector|"
                    r"modality_projection|aligner|visual_projection|embed_vision|mlp1|deepstack_merger_list)(\.|$)"),
        (VISION, r"(^|\.)(vision_model|vision_tower|visual|vision_encoder|image_encoder|vit|vision)(\.|$)"),
        (CROSS, r"(^|\.)(cross_attn|crossattention|cross_attention|encoder_attn)(\.|$)"),
        (LANGUAGE, r"(^|\.)(language_model|text_model|lm_head|decoder|embed_out)(\.|$)"),
    ),
    vision_inputs=r"(cross_attn|crossattention|cross_attention)\.(k_proj|v_proj|key|value)$",
)  # fmt: skip

_TEXT = Layout(towers=((LANGUAGE, r"^"),))

# Vision tower, projector and language model side by side, as in LLaVA and its kin.
_SIDE_BY_SIDE = Layout(
    towers=(
        (VISION, r"^model\.vision_tower\."),
        (PROJECTOR, r"^model\.(multi_modal_projector\.|image_newline$)"),
        (LANGUAGE, r"^(model\.language_model\.|lm_head$)"),
    )
)
_MERGER = Layout(
    towers=(
        (PROJECTOR, r"^model\.visual\.merger\."),
        (VISION, r"^model\.visual\.(?!merger\.)"),
        (LANGUAGE, r"^(model\.language_model\.|lm_head$)"),
    )
)
_CONNECTOR = Layout(
    towers=(
        (VISION, r"^model\.vision_model\."),
        (PROJECTOR, r"^model\.connector\."),
        (LANGUAGE, r"^(model\.text_model\.|lm_head$)"),
    )
)

# By class name. The patterns of one architecture exclude each other: a layer meets exactly one.
LAYOUTS: dict[str, Layout] = {
    "MllamaForConditionalGeneration": Layout(
        towers=(
            (VISION, r"^model\.vision_model\."),
            (PROJECTOR, r"^model\.multi_modal_projector(\.|$)"),
            (CROSS, r"^model\.language_model\.layers\.\d+\.cross_attn\."),
            (LANGUAGE, r"^(model\.language_model\.(?!layers\.\d+\.cross_attn\.)|lm_head$)"),
        ),
        vision_inputs=r"\.cross_attn\.[kv]_proj$",
    ),
    "Qwen2VLForConditionalGeneration": _MERGER,
    "Qwen2_5_VLForConditionalGeneration": _MERGER,
    "LlavaForConditionalGeneration": _SIDE_BY_SIDE,
    "LlavaNextForConditionalGeneration": _SIDE_BY_SIDE,
    # Its projector is a bare parameter, so no linear belongs to that tower.
    "Gemma3ForConditionalGeneration": _SIDE_BY_SIDE,
    "PaliGemmaForConditionalGeneration": _SIDE_BY_SIDE,
    "InternVLForConditionalGeneration": _SIDE_BY_SIDE,
    "Idefics3ForConditionalGeneration": _CONNECTOR,
    "SmolVLMForConditionalGeneration": _CONNECTOR,
    "LlamaForCausalLM": _TEXT,
    "Qwen3ForCausalLM": _TEXT,
    "Qwen3MoeForCausalLM": _TEXT,
}

# Linears that inference engines fuse into one matrix, so that they share one precision.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Cross-attention reads its queries from text and its keys from vision: engines fuse only k and v.
FUSED_CROSS = (("k_proj", "v_proj"), ("gate_proj", "up_proj"))
# vLLM 0.19.1, models/*.py, `packed_modules_mapping`: these become one matrix with one precision, in every
# tower.
VLLM_FUSED = {"qkv_proj": FUSED[0], "gate_up_proj": FUSED[1]}


def tower_of(name: str, architecture: str, has_vision: bool) -> str:
    """The tower of the linear `name`; an unmatched layer of a text-only model is "language"."""
    layout = LAYOUTS.get(architecture, GENERIC)
    for tower, pattern in layout.towers:
        if re.search(pattern, name):
            return tower
    return OTHER if has_vision else LANGUAGE


def reads_vision(name: str, architecture: str, tower: str) -> bool:
    """True if the inputs of the linear `name` are vision tokens only."""
    if tower in (VISION, PROJECTOR):
        return True
    pattern = LAYOUTS.get(architecture, GENERIC).vision_inputs
    return pattern is not None and re.search(pattern, name) is not None


def group_of(name: str, siblings: frozenset[str], tower: str) -> str:
    """The fused group of `name`: the joint name of its members, or `name` if it stands alone.

    siblings: names of all linears; a group counts only if every member exists.
    """
    return fused_group(name, siblings, FUSED_CROSS if tower == CROSS else FUSED)


def fused_group(name: str, siblings: frozenset[str], fused: Iterable[tuple[str, ...]]) -> str:
    """`group_of` by the groups `fused`, each of last parts of names."""
    parent, _, leaf = name.rpartition(".")
    for members in fused:
        if leaf in members and all(f"{parent}.{m}" in siblings for m in members):
            return f"{parent}.{{{','.join(members)}}}"
    return name
