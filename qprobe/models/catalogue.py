"""Models known by a short name: where they come from, their sizes, and what others published about them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from qprobe.models.spellings import whole_parts
from qprobe.records import Inventory


@dataclass(frozen=True)
class PublishedList:
    """A hand-made skip-list; `entries` use checkpoint names and match whole dotted components."""

    author: str
    source: str
    entries: tuple[str, ...]

    def kept(self, inventory: Inventory) -> frozenset[str]:
        """Names of the linears that the list keeps in 16-bit."""
        return frozenset(
            x.name for e in self.entries for x in inventory.layers if whole_parts(e, x.checkpoint_name)
        )

    def dead(self, inventory: Inventory) -> tuple[str, ...]:
        """Entries that match no linear of the model."""
        names = [x.checkpoint_name for x in inventory.layers]
        return tuple(e for e in self.entries if not any(whole_parts(e, name) for name in names))


@dataclass(frozen=True)
class PublishedSize:
    """What somebody says a model occupies: parameter bytes without quantization state, in GiB.

    layout: the layout of `qprobe plan` it belongs to; an author's name for that author's list.
    """

    layout: str
    gib: float
    source: str


@dataclass(frozen=True)
class Entry:
    """One catalogue line. hub_id is None for a model that qprobe carries itself.

    geometry: name of its file in `geometries`, from which all about its size follows without a network.
    """

    alias: str
    hub_id: str | None
    architecture: str
    note: str
    published: tuple[PublishedList, ...] = ()
    geometry: str | None = None
    published_sizes: tuple[PublishedSize, ...] = ()

    @property
    def is_gated(self) -> bool:
        """True if the weights can be had only after accepting a licence on the hub."""
        return self.note == GATED


UNSLOTH_LLAMA_11B = PublishedList(
    author="unsloth",
    source="config.json of unsloth/Llama-3.2-11B-Vision-Instruct-unsloth-bnb-4bit",
    entries=(
        "lm_head",
        "multi_modal_projector",
        "merger",
        "modality_projection",
        "language_model.model.layers.1.self_attn",
        "language_model.model.layers.1.mlp",
        "vision_model.transformer.layers.13.mlp.fc2",
        *(f"language_model.model.layers.{i}.cross_attn.o_proj" for i in (8, 13, 18, 23, 28, 33, 38)),
        "language_model.model.layers.13.mlp.down_proj",
        "language_model.model.layers.18.mlp.down_proj",
    ),
)

_BLOG = "https://unsloth.ai/blog/dynamic-4bit"
_LLAMA_11B_SIZES = (
    PublishedSize("16-bit", 19.87, _BLOG),
    PublishedSize("nf4", 6.54, _BLOG),
    PublishedSize("unsloth", 7.23, _BLOG),
)
_QWEN2_VL_2B_SIZES = (
    PublishedSize("16-bit", 4.11, _BLOG),
    PublishedSize("nf4", 1.36, _BLOG),
    PublishedSize("unsloth", 1.81, _BLOG),
)

GATED = "gated on the hub: accept its licence, then `hf auth login`"
OPEN = "open download"

_MLLAMA = "MllamaForConditionalGeneration"
_QWEN2_VL = "Qwen2VLForConditionalGeneration"
_QWEN2_5_VL = "Qwen2_5_VLForConditionalGeneration"
_LLAVA = "LlavaForConditionalGeneration"
_LLAVA_NEXT = "LlavaNextForConditionalGeneration"
_IDEFICS3 = "Idefics3ForConditionalGeneration"
_SMOLVLM = "SmolVLMForConditionalGeneration"
_GEMMA3 = "Gemma3ForConditionalGeneration"
_PALIGEMMA = "PaliGemmaForConditionalGeneration"
_INTERNVL = "InternVLForConditionalGeneration"
_LLAMA = "LlamaForCausalLM"
_QWEN3 = "Qwen3ForCausalLM"
_QWEN3_MOE = "Qwen3MoeForCausalLM"
_LLAMA_11B = "meta-llama/Llama-3.2-11B-Vision-Instruct"

# (alias, hub id, architecture, note, geometry). Two aliases of one hub id are two names of one model.
_ON_THE_HUB: tuple[tuple[str, str, str, str, str], ...] = (
    # The figures and the list published for "Llama 3.2 11B Vision" are those of the instruction-tuned model,
    # so the short name means it. The base model has smaller tiles (448 pixels) and 27 M parameters less.
    ("llama-3.2-11b-vision", _LLAMA_11B, _MLLAMA, GATED, "llama-3.2-11b-vision"),
    ("llama-3.2-11b-vision-instruct", _LLAMA_11B, _MLLAMA, GATED, "llama-3.2-11b-vision"),
    (
        "llama-3.2-11b-vision-base",
        "meta-llama/Llama-3.2-11B-Vision",
        _MLLAMA,
        GATED,
        "llama-3.2-11b-vision-448",
    ),
    ("llama-3.2-90b-vision", "meta-llama/Llama-3.2-90B-Vision", _MLLAMA, GATED, "llama-3.2-90b-vision"),
    (
        "llama-3.2-90b-vision-instruct",
        "meta-llama/Llama-3.2-90B-Vision-Instruct",
        _MLLAMA,
        GATED,
        "llama-3.2-90b-vision",
    ),
    ("qwen2-vl-2b", "Qwen/Qwen2-VL-2B", _QWEN2_VL, OPEN, "qwen2-vl-2b"),
    ("qwen2-vl-2b-instruct", "Qwen/Qwen2-VL-2B-Instruct", _QWEN2_VL, OPEN, "qwen2-vl-2b"),
    ("qwen2-vl-7b", "Qwen/Qwen2-VL-7B", _QWEN2_VL, OPEN, "qwen2-vl-7b"),
    ("qwen2-vl-7b-instruct", "Qwen/Qwen2-VL-7B-Instruct", _QWEN2_VL, OPEN, "qwen2-vl-7b"),
    ("qwen2-vl-72b", "Qwen/Qwen2-VL-72B", _QWEN2_VL, OPEN, "qwen2-vl-72b"),
    ("qwen2-vl-72b-instruct", "Qwen/Qwen2-VL-72B-Instruct", _QWEN2_VL, OPEN, "qwen2-vl-72b"),
    # Only instruction-tuned weights of Qwen2.5-VL were published, so the short name means those.
    ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", _QWEN2_5_VL, OPEN, "qwen2.5-vl-3b"),
    ("qwen2.5-vl-3b-instruct", "Qwen/Qwen2.5-VL-3B-Instruct", _QWEN2_5_VL, OPEN, "qwen2.5-vl-3b"),
    ("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", _QWEN2_5_VL, OPEN, "qwen2.5-vl-7b"),
    ("qwen2.5-vl-7b-instruct", "Qwen/Qwen2.5-VL-7B-Instruct", _QWEN2_5_VL, OPEN, "qwen2.5-vl-7b"),
    ("qwen2.5-vl-32b", "Qwen/Qwen2.5-VL-32B-Instruct", _QWEN2_5_VL, OPEN, "qwen2.5-vl-32b"),
    ("qwen2.5-vl-32b-instruct", "Qwen/Qwen2.5-VL-32B-Instruct", _QWEN2_5_VL, OPEN, "qwen2.5-vl-32b"),
    ("qwen2.5-vl-72b", "Qwen/Qwen2.5-VL-72B-Instruct", _QWEN2_5_VL, OPEN, "qwen2.5-vl-72b"),
    ("qwen2.5-vl-72b-instruct", "Qwen/Qwen2.5-VL-72B-Instruct", _QWEN2_5_VL, OPEN, "qwen2.5-vl-72b"),
    ("pixtral-12b", "mistral-community/pixtral-12b", _LLAVA, OPEN, "pixtral-12b"),
    ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", _LLAVA, OPEN, "llava-1.5-7b"),
    ("llava-next", "llava-hf/llava-v1.6-mistral-7b-hf", _LLAVA_NEXT, OPEN, "llava-v1.6-mistral-7b"),
    (
        "llava-v1.6-mistral-7b",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        _LLAVA_NEXT,
        OPEN,
        "llava-v1.6-mistral-7b",
    ),
    ("idefics3-8b", "HuggingFaceM4/Idefics3-8B-Llama3", _IDEFICS3, OPEN, "idefics3-8b"),
    # No plain "smolvlm": it would have to be the first SmolVLM-Instruct, which is another checkpoint.
    ("smolvlm2", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", _SMOLVLM, OPEN, "smolvlm2-2.2b"),
    ("smolvlm2-2.2b", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", _SMOLVLM, OPEN, "smolvlm2-2.2b"),
    ("smolvlm-500m", "HuggingFaceTB/SmolVLM-500M-Instruct", _IDEFICS3, OPEN, "smolvlm-500m"),
    ("smolvlm-256m", "HuggingFaceTB/SmolVLM-256M-Instruct", _IDEFICS3, OPEN, "smolvlm-256m"),
    ("gemma-3-4b", "google/gemma-3-4b-pt", _GEMMA3, GATED, "gemma-3-4b"),
    ("gemma-3-4b-it", "google/gemma-3-4b-it", _GEMMA3, GATED, "gemma-3-4b"),
    ("gemma-3-12b", "google/gemma-3-12b-pt", _GEMMA3, GATED, "gemma-3-12b"),
    ("gemma-3-12b-it", "google/gemma-3-12b-it", _GEMMA3, GATED, "gemma-3-12b"),
    ("gemma-3-27b", "google/gemma-3-27b-pt", _GEMMA3, GATED, "gemma-3-27b"),
    ("gemma-3-27b-it", "google/gemma-3-27b-it", _GEMMA3, GATED, "gemma-3-27b"),
    ("paligemma", "google/paligemma-3b-pt-224", _PALIGEMMA, GATED, "paligemma-3b"),
    ("paligemma-3b", "google/paligemma-3b-pt-224", _PALIGEMMA, GATED, "paligemma-3b"),
    ("paligemma2-3b", "google/paligemma2-3b-pt-224", _PALIGEMMA, GATED, "paligemma2-3b"),
    ("internvl3-1b", "OpenGVLab/InternVL3-1B-hf", _INTERNVL, OPEN, "internvl3-1b"),
    ("internvl3-2b", "OpenGVLab/InternVL3-2B-hf", _INTERNVL, OPEN, "internvl3-2b"),
    ("internvl3-8b", "OpenGVLab/InternVL3-8B-hf", _INTERNVL, OPEN, "internvl3-8b"),
    ("llama-3.2-1b", "meta-llama/Llama-3.2-1B", _LLAMA, GATED, "llama-3.2-1b"),
    ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", _LLAMA, GATED, "llama-3.2-1b"),
    ("llama-3.2-3b", "meta-llama/Llama-3.2-3B", _LLAMA, GATED, "llama-3.2-3b"),
    ("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", _LLAMA, GATED, "llama-3.2-3b"),
    ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", _LLAMA, GATED, "llama-3.1-8b"),
    ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", _LLAMA, GATED, "llama-3.1-8b"),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B", _QWEN3, OPEN, "qwen3-0.6b"),
    ("qwen3-1.7b", "Qwen/Qwen3-1.7B", _QWEN3, OPEN, "qwen3-1.7b"),
    ("qwen3-4b", "Qwen/Qwen3-4B", _QWEN3, OPEN, "qwen3-4b"),
    ("qwen3-8b", "Qwen/Qwen3-8B", _QWEN3, OPEN, "qwen3-8b"),
    ("qwen3-14b", "Qwen/Qwen3-14B", _QWEN3, OPEN, "qwen3-14b"),
    ("qwen3-32b", "Qwen/Qwen3-32B", _QWEN3, OPEN, "qwen3-32b"),
    ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", _QWEN3_MOE, OPEN, "qwen3-30b-a3b"),
)

# By geometry: the models that share one share what was published about it.
_LISTS = {name: (UNSLOTH_LLAMA_11B,) for name in ("llama-3.2-11b-vision", "llama-3.2-11b-vision-448")}
_SIZES = {"llama-3.2-11b-vision": _LLAMA_11B_SIZES, "qwen2-vl-2b": _QWEN2_VL_2B_SIZES}

ENTRIES: tuple[Entry, ...] = (
    *(
        Entry(alias, None, _MLLAMA, f"embedded; {note}", geometry="demo")
        for alias, note in (
            ("demo", "a small model trained on drawn scenes, needs no network"),
            ("demo-outliers", "demo re-parameterized so that planted layers break in 4-bit"),
        )
    ),
    *(
        Entry(alias, hub_id, architecture, note, _LISTS.get(name, ()), name, _SIZES.get(name, ()))
        for alias, hub_id, architecture, note, name in _ON_THE_HUB
    ),
)


def find(model: str) -> Entry | None:
    """The entry whose alias or hub id is `model`, upper and lower case alike; None if there is none."""
    wanted = model.lower()
    for entry in ENTRIES:
        if wanted in (entry.alias, (entry.hub_id or "").lower()):
            return entry
    return None


def nearest(model: str, count: int = 3) -> tuple[str, ...]:
    """At most `count` aliases that begin with `model`, else those spelt most like it; maybe none."""
    typed = model.lower().rpartition("/")[2]
    aliases = [entry.alias for entry in ENTRIES]
    begun = [alias for alias in aliases if typed and alias.startswith(typed)]
    return tuple(begun[:count] or get_close_matches(typed, aliases, count, cutoff=0.5))
