"""`qprobe export`: one writer a tool, all over the same checked entries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.errors import QprobeError
from qprobe.exports import engines, training
from qprobe.exports.keys import (
    exact,
    exact_entries,
    transformers_4_readers,
    transformers_readers,
)
from qprobe.exports.shared import Written, bits_and_bytes, rounding_notes, snippet, where_notes
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest


@dataclass(frozen=True)
class Export:
    """text: the file for `tool`, as it must be handed on. notes: sentences its user must see."""

    tool: str
    text: str
    notes: tuple[str, ...]
    layers_16bit: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `export --json`."""
        return {
            "tool": self.tool,
            "text": self.text,
            "notes": list(self.notes),
            "layers_16bit": list(self.layers_16bit),
        }


def export_manifest(manifest: Manifest | str | Path, to: str) -> Export:
    """The list of `manifest` (or of the file at that path) in the language of the tool `to`, one of TOOLS.

    The entries were run through the tool's own rule: they keep exactly the manifest's 16-bit layers, the
    output head and tied weights among them. Raises QprobeError for an unknown tool, ManifestError,
    naming the layer, where the tool cannot be told so.
    """
    if to not in TOOLS:
        raise QprobeError(f"No tool {to!r}: qprobe exports to {', '.join(TOOLS)}.")
    written = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    text, notes = TOOLS[to](written)
    lost = () if to in OF_CHECKPOINTS else rounding_notes(written, to)
    return Export(to, text, (*notes, *lost), written.skip_modules)


def _transformers(manifest: Manifest) -> Written:
    entries = exact_entries(transformers_readers(manifest), str, exact)
    return Written(json.dumps(bits_and_bytes(manifest, entries), indent=2) + "\n", ())


def _transformers_python(manifest: Manifest) -> Written:
    entries = exact_entries(transformers_readers(manifest), str, exact)
    return Written(
        snippet(
            manifest,
            entries,
            imports=("from transformers import AutoModelForImageTextToText",),
            load="model = AutoModelForImageTextToText.from_pretrained(\n"
            "    {model}, dtype={dtype}, quantization_config=quantization\n)\n",
        ),
        ("For a model without a vision part write AutoModelForCausalLM.", *where_notes(manifest)),
    )


def _transformers_4(manifest: Manifest) -> Written:
    entries = exact_entries(transformers_4_readers(manifest), str)
    return Written(
        json.dumps(bits_and_bytes(manifest, entries), indent=2) + "\n",
        (
            "Names of transformers 4.52 to 4.57 and of 4.51 and before stand in one list; each ignores the "
            "other's.",
        ),
    )


# These work on a model that is in 4-bit already; all others make it from 16-bit weights.
OF_CHECKPOINTS = ("vllm", "peft", "llama-factory")

# In the order in which the help shows them.
TOOLS: Mapping[str, Callable[[Manifest], Written]] = {
    "transformers": _transformers,
    "transformers-python": _transformers_python,
    "transformers-4": _transformers_4,
    "unsloth": training.unsloth,
    "vllm": engines.vllm,
    "peft": training.peft,
    "axolotl": training.axolotl,
    "llama-factory": training.llama_factory,
    "llm-compressor": engines.llm_compressor,
    "gptqmodel": engines.gptqmodel,
    "autoround": engines.autoround,
    "llama.cpp": engines.llama_cpp,
}
