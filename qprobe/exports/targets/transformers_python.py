"""transformers 5: Python that loads the model."""

from __future__ import annotations

from collections.abc import Sequence

from qprobe.exports.keys import transformers_readers
from qprobe.exports.target import Target, Written
from qprobe.exports.writing import snippet, where_notes
from qprobe.manifest.records import Manifest


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """A Python snippet."""
    text = snippet(
        manifest,
        entries,
        imports=("from transformers import AutoModelForImageTextToText",),
        load="model = AutoModelForImageTextToText.from_pretrained(\n"
        "    {model}, dtype={dtype}, quantization_config=quantization\n)\n",
    )
    notes = ("For a model without a vision part write AutoModelForCausalLM.", *where_notes(manifest))
    return Written(text, notes)


TARGET = Target(
    name="transformers-python",
    summary="the same as Python that loads the model",
    readers=transformers_readers,
    write=write,
)
