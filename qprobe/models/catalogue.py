"""Models known by a short name: where they come from, and the skip-lists others published for them."""

from __future__ import annotations

from dataclasses import dataclass

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
            x.name
            for x in inventory.layers
            if any(f".{e}." in f".{x.checkpoint_name}." for e in self.entries)
        )


@dataclass(frozen=True)
class Entry:
    """One catalogue line. hub_id is None for a model that qprobe carries itself."""

    alias: str
    hub_id: str | None
    architecture: str
    note: str
    published: tuple[PublishedList, ...] = ()


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

_MLLAMA = "MllamaForConditionalGeneration"
_GATED = "gated on the hub: accept its licence, then `hf auth login`"

ENTRIES: tuple[Entry, ...] = (
    Entry("demo", None, _MLLAMA, "embedded; a small model trained on drawn scenes, needs no network"),
    Entry(
        "demo-outliers",
        None,
        _MLLAMA,
        "embedded; demo re-parameterized so that planted layers break in 4-bit",
    ),
    Entry("llama-3.2-11b-vision", "meta-llama/Llama-3.2-11B-Vision", _MLLAMA, _GATED, (UNSLOTH_LLAMA_11B,)),
    Entry(
        "llama-3.2-11b-vision-instruct",
        "meta-llama/Llama-3.2-11B-Vision-Instruct",
        _MLLAMA,
        _GATED,
        (UNSLOTH_LLAMA_11B,),
    ),
    Entry(
        "qwen2-vl-2b-instruct",
        "Qwen/Qwen2-VL-2B-Instruct",
        "Qwen2VLForConditionalGeneration",
        "open download",
    ),
    Entry(
        "qwen2-vl-7b-instruct",
        "Qwen/Qwen2-VL-7B-Instruct",
        "Qwen2VLForConditionalGeneration",
        "open download",
    ),
    Entry("pixtral-12b", "mistral-community/pixtral-12b", "LlavaForConditionalGeneration", "open download"),
)


def find(model: str) -> Entry | None:
    """The entry whose alias or hub id is `model`, upper and lower case alike; None if there is none."""
    wanted = model.lower()
    for entry in ENTRIES:
        if wanted in (entry.alias, (entry.hub_id or "").lower()):
            return entry
    return None
