"""Unsloth 2026.10.9: Python that loads the model with FastModel."""

from __future__ import annotations

from collections.abc import Sequence

from qprobe.exports.keys import Reader, reader, transformers_readers
from qprobe.exports.matchers import transformers_5_21
from qprobe.exports.target import Target, Written
from qprobe.exports.writing import snippet, where_notes
from qprobe.manifest.records import Manifest


def rule(entry: str, name: str) -> bool:
    """unsloth 2026.10.9, models/_utils.py, `patched_should_convert_module`: transformers' rule on aliases."""
    old, new = "language_model.model.", "language_model."
    names = {name, name.replace(old, new)}
    names |= {x.removeprefix("model.") for x in names if x.startswith("model.language_model.")}
    return any(transformers_5_21(e, n) for e in {entry, entry.replace(old, new)} for n in names)


def readers(manifest: Manifest) -> list[Reader]:
    """transformers, patched by Unsloth and as it is."""
    return [*transformers_readers(manifest), reader(manifest, "unsloth", rule, lambda x: x.name)]


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """A Python snippet: FastModel takes `quantization_config`, and its own list gives way to it
    (models/loader.py, `FastModel.from_pretrained`; models/vision.py, `_with_architecture_skip_modules`)."""
    text = snippet(
        manifest,
        entries,
        imports=("from unsloth import FastModel",),
        load="model, processor = FastModel.from_pretrained(\n"
        "    {model}, dtype={dtype}, quantization_config=quantization,\n"
        "    use_exact_model_name=True,\n)\n",
    )
    return Written(
        text,
        (
            "use_exact_model_name=True matters: without it Unsloth replaces a model that it knows by its own "
            "4-bit checkpoint, which brings another list.",
            *where_notes(manifest),
        ),
    )


TARGET = Target(
    name="unsloth", summary="Python that loads the model with FastModel", readers=readers, write=write
)
