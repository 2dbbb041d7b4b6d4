"""Adapters for the tiny models, made without training: every lora_B is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from qprobe.checkpoint.ready import lora_targets
from qprobe.loading.config import model_class
from qprobe.loading.skeleton import skeleton_of
from qprobe.loading.source import resolve
from tests import tiny

DECODERS = ("qwen3", "gemma2", "mistral", "phi3", "olmo2")  # families beside those of tests/tiny.py
SCALING = 2.0  # alpha 8 over rank 4, of `write_adapter`


def write_family(name: str, folder: Path) -> Path:
    """`folder`, filled with a tiny random model of the text family `name`, with a tokenizer."""
    config = AutoConfig.for_model(name, **tiny.decoder(64, 96, 2), head_dim=16)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    tiny.draw_weights(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    for part in tiny.text_tokenizer():
        part.save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, std: float = 0.03, **config: Any) -> Path:
    """`folder`, with an adapter on all linears of the model in `base`, as peft writes it."""
    import peft

    skeleton = skeleton_of(resolve(str(base)), "bfloat16")
    model: Any = skeleton.model
    asked = {"r": 4, "lora_alpha": 8, "target_modules": lora_targets(model, "all"), **config}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**asked), low_cpu_mem_usage=True)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    torch.manual_seed(1)
    state = {
        name: torch.randn(tuple(x.shape)) * (std if "lora_B" in name else 0.2)
        for name, x in peft.get_peft_model_state_dict(tuned, save_embedding_layers=False).items()
    }
    folder.mkdir()
    tuned.peft_config["default"].save_pretrained(folder)
    save(folder, state)
    return folder


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def plainly(folder: Path) -> Any:
    """The checkpoint as a user of transformers loads it; bitsandbytes' repacking on some CPUs is off."""
    model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def added(adapter: Path, scaling: float) -> dict[str, Tensor]:
    """layer -> scaling * B A in float32, written down once more."""
    found = load_file(adapter / "adapter_model.safetensors")
    layers = [x.removesuffix(".lora_A.weight") for x in found if x.endswith(".lora_A.weight")]
    return {
        x.removeprefix("base_model.model."): scaling
        * (found[f"{x}.lora_B.weight"] @ found[f"{x}.lora_A.weight"])
        for x in layers
    }
