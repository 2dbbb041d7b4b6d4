"""The command line of qprobe on models whose weights no disk holds: drawn, seeded, where they will lie.

    python -m tests.benchmarks.generated scan --model FOLDER ...

FOLDER is one of `write_outline`: config, processor, and a file of weights with its header alone, which is as
long as it says and takes no room. Loading draws each weight on the device where it belongs, by its name, so
that every process, and every layout over cards, has the same model.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qprobe.loading import reference
from qprobe.loading.inventory import settle
from qprobe.loading.pretrained import REPORT, check_files
from qprobe.loading.skeleton import Skeleton, meta_model
from qprobe.system.log_filters import without_remarks

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
DEVIATION = 0.02  # of matrices, as transformers draws them


def write_outline(folder: Path, config: Any, parts: Sequence[Any]) -> int:
    """A model folder without weights, see above; the bytes that its weights would have. parts: saved too."""
    from transformers.core_model_loading import revert_weight_conversion

    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    model: Any = meta_model(config, "bfloat16")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(revert_weight_conversion(model, dict(model.state_dict())).items()):
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def generated(skeleton: Skeleton, **options: Any) -> Any:
    """What `load_pretrained` gives, with weights that are drawn in place of those of the files."""
    check_files(skeleton)
    with without_remarks(REPORT):
        cls: Any = type(skeleton.model)
        model = cls.from_pretrained(None, config=copy.deepcopy(skeleton.config), state_dict={}, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw(name, parameter.data)
    settle(model)
    return model


def draw(name: str, weight: Tensor) -> None:
    """Fill `weight`: a matrix at random, seeded by its name; gates open, norms at 1, biases at 0."""
    leaf = name.rpartition(".")[2]
    if weight.numel() == 1:
        weight.fill_(0.5)
    elif weight.dim() < 2:
        weight.fill_(0.0 if "bias" in leaf else 1.0)
    else:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        weight.normal_(std=DEVIATION, generator=torch.Generator(weight.device).manual_seed(seed))


def main() -> None:
    from qprobe.cli import main as command

    reference.load_pretrained = generated
    command()


if __name__ == "__main__":
    main()
