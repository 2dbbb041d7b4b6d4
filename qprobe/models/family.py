"""What qprobe knows of a family of models, and what holds for one that it does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qprobe.models.entry import Entry
from qprobe.models.grid import Grid, ImageTensors, grid_of_pixels, grid_of_thw

VISION, PROJECTOR, CROSS, LANGUAGE, OTHER = "vision", "projector", "cross_attention", "language", "other"

# A regular expression and its replacement, as `re.sub` takes them.
Renaming = tuple[str, str]
# Fused groups, each as the last parts of its members' names.
Groups = tuple[tuple[str, ...], ...]

# Linears that inference engines fuse into one matrix, so that they share one precision.
FUSED: Groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Cross-attention reads its queries from text and its keys from vision: engines fuse only k and v.
FUSED_CROSS: Groups = (("k_proj", "v_proj"), ("gate_proj", "up_proj"))

# Until transformers 5.0 the CLIP and SigLIP towers wrapped their encoder in one more module, `vision_model`;
# files on the hub still do. Pixtral (`transformer.layers`) and InternVL (`encoder.layer`) never had it.
BARE_TOWER: Renaming = (
    r"((?:^|\.)vision_tower)\.(encoder\.layers|head)\.",
    r"\1.vision_model.\2.",
)


@dataclass(frozen=True)
class Engine:
    """How an inference engine treats an architecture.

    fused: by the joint name, the last parts of the linears that become one matrix with one precision, in
    every tower. renames: from the names of the files on the hub to the engine's, in order. dropped: the
    release since which the engine has no model of this architecture; None if it serves it.
    """

    fused: Mapping[str, tuple[str, ...]]
    renames: tuple[Renaming, ...] = ()
    dropped: str | None = None


# vLLM 0.19.1, models/*.py, `packed_modules_mapping`.
VLLM_FUSED = {"qkv_proj": FUSED[0], "gate_up_proj": FUSED[1]}


@dataclass(frozen=True)
class Family:
    """One file of `families/`.

    architectures: class names in transformers.
    towers: (tower, pattern) in order of precedence; a layer is in the first whose pattern `re.search` finds
    in its name. Those of a listed architecture exclude each other: a layer meets exactly one.
    vision_inputs: pattern of the layers outside vision tower and projector that read vision tokens.
    fused, fused_in: fused groups, and those of single towers that differ.
    image_grid: how an image was cut into patches.
    old_names: from today's module names to those of transformers 4.52 to 5.0, in order.
    engines: by name, the inference engines that treat this family in a way of their own.
    entries: the models that are known by a short name.
    """

    architectures: tuple[str, ...]
    towers: tuple[tuple[str, str], ...]
    vision_inputs: str | None = None
    fused: Groups = FUSED
    fused_in: Mapping[str, Groups] = field(default_factory=lambda: {CROSS: FUSED_CROSS})
    image_grid: Callable[[ImageTensors], Grid | None] = grid_of_pixels
    old_names: tuple[Renaming, ...] = ()
    engines: Mapping[str, Engine] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()


def _any_grid(tensors: ImageTensors) -> Grid | None:
    return grid_of_pixels(tensors) if tensors.thw is None else grid_of_thw(tensors)


# Of an architecture that no file lists: words that vision-language models in transformers use for their
# parts. Their order matters, because a projector often sits inside the vision module ("visual.merger").
GENERIC = Family(
    architectures=(),
    towers=(
        (PROJECTOR, r"(^|\.)(multi_modal_projector|mm_projector|projector|merger|connector|"
                    r"modality_projection|aligner|visual_projection|embed_vision|mlp1|deepstack_merger_list)(\.|$)"),
        (VISION, r"(^|\.)(vision_model|vision_tower|visual|vision_encoder|image_encoder|vit|vision)(\.|$)"),
        (CROSS, r"(^|\.)(cross_attn|crossattention|cross_attention|encoder_attn)(\.|$)"),
        (LANGUAGE, r"(^|\.)(language_model|text_model|lm_head|decoder|embed_out)(\.|$)"),
    ),
    vision_inputs=r"(cross_attn|crossattention|cross_attention)\.(k_proj|v_proj|key|value)$",
    image_grid=_any_grid,
    old_names=(BARE_TOWER,),
    engines={"vllm": Engine(VLLM_FUSED)},
)  # fmt: skip

# Vision tower, projector and language model side by side, as in LLaVA and its kin.
SIDE_BY_SIDE = (
    (VISION, r"^model\.vision_tower\."),
    (PROJECTOR, r"^model\.(multi_modal_projector\.|image_newline$)"),
    (LANGUAGE, r"^(model\.language_model\.|lm_head$)"),
)
# The projector is the last part of the vision module, as in Qwen2-VL and its kin.
MERGER = (
    (PROJECTOR, r"^model\.visual\.merger\."),
    (VISION, r"^model\.visual\.(?!merger\.)"),
    (LANGUAGE, r"^(model\.language_model\.|lm_head$)"),
)
