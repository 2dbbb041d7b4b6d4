"""Lists for the tools that fine-tune: Unsloth, peft, Axolotl, LLaMA-Factory."""

from __future__ import annotations

import json

from qprobe.errors import ManifestError
from qprobe.exports import matchers
from qprobe.exports.keys import (
    Reader,
    check_entries,
    exact,
    exact_entries,
    one_pattern,
    reader,
    transformers_readers,
)
from qprobe.exports.shared import Written, bits_and_bytes, snippet, where_notes, yaml
from qprobe.manifest.records import Manifest


def unsloth(manifest: Manifest) -> Written:
    """Python for unsloth 2026.10.9: FastModel takes `quantization_config`, and its own list gives way to it
    (models/loader.py, `FastModel.from_pretrained`; models/vision.py, `_with_architecture_skip_modules`)."""
    readers = [
        *transformers_readers(manifest),
        reader(manifest, "unsloth", matchers.unsloth, lambda x: x.name),
    ]
    entries = exact_entries(readers, str, exact)
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


def peft(manifest: Manifest) -> Written:
    """JSON: `target_modules` for LoraConfig as one regular expression, and which layers are 4-bit."""
    pattern = target_pattern(manifest)
    by_precision = {
        precision: [x.name for x in manifest.layers if x.precision == precision]
        for precision in ("nf4", "bf16")
    }
    data = {
        "target_modules": pattern,
        "layers_4bit": by_precision["nf4"],
        "layers_16bit": by_precision["bf16"],
    }
    return Written(
        json.dumps(data, indent=2) + "\n",
        (
            "LoraConfig(target_modules=...) takes the string as it is; a list would be read as endings.",
            "peft.prepare_model_for_kbit_training turns 16-bit into float32, the kept layers too.",
        ),
    )


def target_pattern(manifest: Manifest) -> str:
    """One regular expression that peft matches to every linear layer but the output head and tied weights."""
    adapted = {x.name: not _is_head(x.name, x.reason) for x in manifest.layers}
    if not any(adapted.values()):
        raise ManifestError(
            "The manifest lists no layer that an adapter could go on; scan a model with linear layers."
        )
    pattern = one_pattern(name for name, wanted in adapted.items() if wanted)
    check_entries([pattern], [Reader("peft", matchers.peft, adapted)])
    return pattern


def _is_head(name: str, reason: str) -> bool:
    """The reasons are those that `select` writes for layers that are never quantized."""
    return name.rpartition(".")[2] in ("lm_head", "embed_out") or reason.startswith(("lm_head", "tied"))


def axolotl(manifest: Manifest) -> Written:
    """YAML for axolotl 0.19.0: `bnb_config_kwargs` goes into its BitsAndBytesConfig (loaders/model.py)."""
    entries = exact_entries(transformers_readers(manifest), str, exact)
    config = bits_and_bytes(manifest, entries)
    del config["load_in_4bit"], config["bnb_4bit_compute_dtype"]  # axolotl sets both from the lines below
    half = {"bfloat16": "bf16", "float16": "fp16"}[manifest.format.compute_dtype]
    values = {
        "base_model": manifest.model.id,
        "adapter": "qlora",
        "load_in_4bit": True,
        half: True,
        "bnb_config_kwargs": config,
        "lora_target_modules": target_pattern(manifest),
    }
    return Written(
        yaml(values),
        ("Add these lines to your configuration, in place of the same keys.", *where_notes(manifest)),
    )


def llama_factory(manifest: Manifest) -> Written:
    """YAML for llamafactory 0.9.5, whose own 4-bit takes no list (model/model_utils/quantization.py).

    It does load a checkpoint that was quantized before as its config says (same file, "ptq").
    """
    exact_entries(transformers_readers(manifest), str, exact)  # such a checkpoint can be made
    head = (
        "# LLaMA-Factory's quantization_bit has no option for layers that stay in 16-bit, so the list\n"
        "# travels in the checkpoint: write one with `qprobe quantize` and name its folder here, without\n"
        "# quantization_bit.\n"
        "# Layers in 16-bit there:\n"
    )
    kept = "".join(f"#   {name}\n" for name in manifest.skip_modules)
    values = {"model_name_or_path": "path/to/the/quantized/checkpoint", "finetuning_type": "lora"}
    return Written(
        head + kept + yaml({**values, "lora_target": "all"}),
        ("LLaMA-Factory takes no skip-list; the lines name the checkpoint that carries it.",),
    )
