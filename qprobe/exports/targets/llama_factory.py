"""llamafactory 0.9.5, whose own 4-bit takes no list (model/model_utils/quantization.py).

It does load a checkpoint that was quantized before as its config says (same file, "ptq"), by transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

from qprobe.exports.keys import transformers_readers
from qprobe.exports.target import Target, Written
from qprobe.exports.writing import yaml_text
from qprobe.manifest.records import Manifest
from qprobe.system.wording import visible

_HEAD = """\
# LLaMA-Factory's quantization_bit has no option for layers that stay in 16-bit, so the list
# travels in the checkpoint: write one with `qprobe quantize` and name its folder here, without
# quantization_bit.
# Layers in 16-bit there:
"""


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """YAML that names a checkpoint; `entries` are those that its config will have."""
    kept = "".join(f"#   {visible(name)}\n" for name in manifest.skip_modules)
    values = {
        "model_name_or_path": "path/to/the/quantized/checkpoint",
        "finetuning_type": "lora",
        "lora_target": "all",
    }
    return Written(
        _HEAD + kept + yaml_text(values),
        ("LLaMA-Factory takes no skip-list; the lines name the checkpoint that carries it.",),
    )


TARGET = Target(
    name="llama-factory",
    summary="YAML that loads a checkpoint which carries the list",
    readers=transformers_readers,
    write=write,
    of_checkpoint=True,
)
