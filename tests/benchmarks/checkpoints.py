"""Checkpoints of a real geometry with random weights, and samples to run through them."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import MllamaConfig, MllamaProcessor, PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from qprobe.loading.config import catalogue_config
from qprobe.loading.skeleton import meta_model
from qprobe.models.catalogue import find
from tests.benchmarks.cost import full_config, tiny_config
from tests.tiny import CONTROLS, END, PAD, UNK, chat_template

SEED = 0
SHARD_BYTES = 5 * 10**9
PROMPT_TOKENS, ANSWER_TOKENS = 256, 64
_TEMPLATE_TOKENS = 5  # bos, user, image, end, assistant
_LETTERS = string.ascii_lowercase + " "


GEOMETRIES = ("11b", "90b")


def geometry(share: float, is_tiny: bool, name: str = "11b") -> MllamaConfig:
    """The config of one of `GEOMETRIES` with that share of the layers of each tower; 1 is the whole model."""
    if is_tiny:
        config: Any = tiny_config()
    elif name == "11b":
        config = full_config()
    else:
        entry = find(f"llama-3.2-{name}-vision")
        assert entry is not None, name
        config = catalogue_config(entry)
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers = max(2, round(text.num_hidden_layers * share))
    text.cross_attention_layers = [i for i in text.cross_attention_layers if i < text.num_hidden_layers]
    vision.num_hidden_layers = max(2, round(vision.num_hidden_layers * share))
    vision.num_global_layers = max(1, round(vision.num_global_layers * share))
    kept = [i for i in vision.intermediate_layers_indices if i < vision.num_hidden_layers]
    vision.intermediate_layers_indices = kept
    vision.vision_output_dim = vision.hidden_size * (1 + len(kept))
    text.bos_token_id, text.eos_token_id, text.pad_token_id = 1, END, PAD
    config.architectures = ["MllamaForConditionalGeneration"]
    return config


def write_checkpoint(
    folder: Path, config: Any, parts: Sequence[Any], device: str, shard_bytes: int = SHARD_BYTES
) -> int:
    """A complete model folder with seeded random bf16 weights made on `device`; the bytes of the weights.

    config: names its architecture. parts: processor or tokenizer, saved beside it. Weights lie in files of
    about `shard_bytes`, under the names that files on the hub have.
    """
    from transformers.core_model_loading import revert_weight_conversion

    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    model: Any = meta_model(config, "bfloat16")
    outlines = revert_weight_conversion(model, dict(model.state_dict()))
    generator = torch.Generator(device).manual_seed(SEED)
    where: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = held = 0
    for name, outline in sorted(outlines.items()):
        shard[name] = _drawn(name, outline, generator)
        held += shard[name].nbytes
        if held >= shard_bytes:
            total += _save(folder, shard, where)
            shard, held = {}, 0
    total += _save(folder, shard, where) if shard else 0
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _drawn(name: str, outline: Tensor, generator: torch.Generator) -> Tensor:
    """One tensor on the CPU: matrices of the deviation that transformers draws, gates open, norms at 1."""
    leaf = name.rpartition(".")[2]
    if outline.dtype != torch.bfloat16:
        return torch.zeros(outline.shape, dtype=outline.dtype)
    if outline.numel() == 1:
        return torch.full(outline.shape, 0.5, dtype=torch.bfloat16)
    if outline.dim() < 2:
        return torch.full(outline.shape, 0.0 if "bias" in leaf else 1.0, dtype=torch.bfloat16)
    drawn = torch.empty(outline.shape, dtype=torch.bfloat16, device=generator.device)
    return drawn.normal_(std=0.02, generator=generator).cpu()


def _save(folder: Path, shard: dict[str, Tensor], where: dict[str, str]) -> int:
    file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    where |= dict.fromkeys(shard, file)
    return sum(x.nbytes for x in shard.values())


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One that needs no network: one token per character, and `vocab_size` ids."""
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # byte-level space and newline
    named = [*CONTROLS, *characters]
    names = [*named, *(f"<|filler-{i}|>" for i in range(vocab_size - len(named)))]
    vocab = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=CONTROLS[UNK]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in CONTROLS])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token=CONTROLS[UNK],
        bos_token=CONTROLS[1],
        pad_token=CONTROLS[PAD],
        eos_token=CONTROLS[END],
    )


def processor(config: MllamaConfig) -> MllamaProcessor:
    """A processor of images with `tokenizer`, which has as many ids as the model's head."""
    vocab_size = config.text_config.vocab_size
    fast = tokenizer(vocab_size)
    # Behind the vocabulary of the head, as on the hub.
    fast.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    assert fast.convert_tokens_to_ids("<|image|>") == config.image_token_index == vocab_size
    size = config.vision_config.image_size
    images = MllamaImageProcessorPil(
        size={"height": size, "width": size}, max_image_tiles=config.vision_config.max_num_tiles
    )
    return MllamaProcessor(images, fast, chat_template=chat_template("<|image|>"))


def write_samples(folder: Path, config: MllamaConfig, count: int) -> Path:
    """FOLDER/samples.jsonl: `count` images of 2 x 2 tiles, prompts of 256 tokens and answers of 64."""
    folder.mkdir(parents=True, exist_ok=True)
    side = 2 * config.vision_config.image_size
    random = np.random.default_rng(SEED)
    lines = []
    for number in range(count):
        # Smooth noise: random colours on a coarse grid, drawn large.
        coarse = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        file = f"image-{number:03d}.jpg"
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / file)
        lines.append(json.dumps({"image": file, **texts(random, PROMPT_TOKENS - _TEMPLATE_TOKENS)}))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines))
    return path


def texts(random: np.random.Generator, prompt_tokens: int) -> dict[str, str]:
    """A row of random letters: a prompt of so many tokens, an answer of `ANSWER_TOKENS` with its end."""
    prompt = "".join(random.choice(list(_LETTERS), prompt_tokens))
    answer = "".join(random.choice(list(string.ascii_lowercase), ANSWER_TOKENS - 1))
    return {"prompt": f"x{prompt[1:-1]}x", "answer": answer}
