"""vLLM: `quantization_config` for a bitsandbytes checkpoint that transformers loads the same way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from qprobe.errors import ManifestError
from qprobe.exports.keys import Reader, exact, kept_names, layer_spellings, transformers_readers
from qprobe.exports.target import Target, Written
from qprobe.exports.writing import bits_and_bytes, experts
from qprobe.manifest.records import Manifest
from qprobe.models.families import engine_of
from qprobe.models.spellings import renamed


def rule(entry: str, name: str) -> bool:
    """vLLM 0.19.1, model_executor/layers/quantization/bitsandbytes.py, `is_layer_skipped_bnb`.

    name: vLLM's own, of the fused module (`qkv_proj`). The entry is one whole part of it, or its beginning up
    to a dot.
    """
    return entry in name.split(".") or f"{name}.".startswith(f"{entry}.")


def readers(manifest: Manifest) -> list[Reader]:
    """transformers, and vLLM with its own names last."""
    return [*transformers_readers(manifest), Reader("vLLM", rule, vllm_modules(manifest))]


def lists(manifest: Manifest, readers: Sequence[Reader]) -> Iterable[list[str]]:
    """The names of both, transformers' plain or anchored."""
    *ours, theirs = readers
    for write in (str, exact):
        yield list(dict.fromkeys([*map(write, kept_names(ours)), *kept_names([theirs])]))


def vllm_modules(manifest: Manifest) -> dict[str, bool]:
    """By vLLM's name of each (fused) linear: whether it stays in 16-bit.

    Raises ManifestError for a fused group of which only a part stays.
    """
    engine = engine_of("vllm", manifest.model.architecture)
    keep: dict[str, tuple[str, bool]] = {}
    names = {names.legacy: (name, kept) for name, (names, kept) in layer_spellings(manifest).items()}
    for legacy, (name, kept) in names.items():
        parent, _, leaf = legacy.rpartition(".")
        joint = [
            f"{parent}.{joint}"
            for joint, members in engine.fused.items()
            if leaf in members and all(f"{parent}.{x}" in names for x in members)
        ]
        theirs = renamed(joint[0] if joint else legacy, engine.renames)
        other, other_kept = keep.setdefault(theirs, (name, kept))
        if other_kept != kept:
            raise ManifestError(_split(theirs, other, other_kept, name))
    return {name: kept for name, (_, kept) in keep.items()}


def _split(joint: str, other: str, other_kept: bool, name: str) -> str:
    in_16bit, in_4bit = (other, name) if other_kept else (name, other)
    return (
        f"vLLM makes one matrix {joint} of layers with different precisions: {in_16bit} stays in 16-bit, "
        f"{in_4bit} does not. Choose a list that keeps such groups whole, with `qprobe select RUN --for "
        "vllm` or `qprobe scan --for vllm`, and build the checkpoint from it."
    )


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """A JSON object with the one key `quantization_config`."""
    config = {"quant_method": "bitsandbytes", **bits_and_bytes(manifest, entries)}
    architecture = manifest.model.architecture
    dropped = engine_of("vllm", architecture).dropped
    return Written(
        json.dumps({"quantization_config": config}, indent=2) + "\n",
        (
            "Put it into the config.json of the checkpoint; vLLM takes a skip-list from nowhere else, and "
            "its own --quantization bitsandbytes of a 16-bit checkpoint keeps nothing.",
            "Names of transformers and of vLLM stand in one list; each ignores the other's.",
            "The rule is that of vLLM up to 0.19.1 at least, and of vllm-bnb-plugin 0.0.3, with which 0.33.0 "
            "reads bitsandbytes.",
            *([f"vLLM serves no {architecture} since {dropped}."] if dropped else []),
            *experts(
                manifest,
                "vLLM chooses the precision of experts by itself: check that it loads the checkpoint's.",
            ),
        ),
    )


TARGET = Target(
    name="vllm",
    summary="quantization_config for the config.json of a checkpoint",
    readers=readers,
    write=write,
    lists=lists,
    of_checkpoint=True,
)
