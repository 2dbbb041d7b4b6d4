"""The demo's training recipe: `python -m qprobe.demo.train --out DIR`, at most 10 minutes on one H100.

Scenes are drawn on the device, a fresh batch for every step, from the distribution of the calibration and
held-out scenes, and reach the model exactly as its processor would deliver them: uint8 pixels at the
model's resolution, mean and deviation 0.5.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from qprobe.demo.draw import SIZE, Dice, photograph, scene_keys, uniforms
from qprobe.demo.evaluate import RECORD, record_evaluation
from qprobe.demo.kinds import SceneStyle
from qprobe.demo.scenes import GRAIN, SPREAD, STYLES, TRAINING_SEED
from qprobe.demo.tokens import BEGIN, END, IMAGE, PAD, chat, processor, vocabulary

PATCH = 14
IGNORED = -100  # the label that torch's cross entropy leaves out
# Relative shares of a batch by style; education has two styles, so it gets more scenes in all.
SHARES = (7, 7, 6, 6, 6)


@dataclass(frozen=True)
class Shape:
    """The model's size; 5.9 million parameters by default, all widths multiples of NF4's block of 64."""

    vision_width: int = 192
    vision_layers: int = 6
    global_layers: int = 2
    vision_heads: int = 6
    collected_layers: tuple[int, ...] = (1, 3)
    text_width: int = 192
    text_layers: int = 5
    text_heads: int = 6
    key_value_heads: int = 2
    text_mlp: int = 512
    cross_attention_layers: tuple[int, ...] = (1, 3)


@dataclass(frozen=True)
class Recipe:
    """Everything the training depends on.

    steps: optimizer steps; None trains for `seconds`, and the learning rate falls by the clock.
    training.json says how many were made; passing that number makes a run as long on a machine of any
    speed.
    """

    steps: int | None = None
    seconds: float = 300.0
    batch: int = 512
    learning_rate: float = 1.5e-3
    warmup: float = 0.03
    weight_decay: float = 0.05
    seed: int = 20
    held_out: int = 400
    shape: Shape = field(default_factory=Shape)


def build_model(shape: Shape) -> MllamaForConditionalGeneration:
    """An untrained fp32 model with the vocabulary of `tokens` and open cross-attention gates."""
    tokens = vocabulary()
    ids = {f"{name}_token_id": tokens.index(t) for name, t in (("bos", BEGIN), ("eos", END), ("pad", PAD))}
    image_token = tokens.index(IMAGE)  # the image token has an embedding but no logit
    config = MllamaConfig(
        vision_config=_vision_config(shape),
        text_config={"vocab_size": image_token, **_text_config(shape), **ids},
        image_token_index=image_token,
        tie_word_embeddings=False,  # pyright: ignore[reportCallIssue]
    )
    model = MllamaForConditionalGeneration(config)
    _open_gates(model)
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=48)
    return model


def _vision_config(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.vision_width,
        "intermediate_size": 4 * shape.vision_width,
        "num_hidden_layers": shape.vision_layers,
        "num_global_layers": shape.global_layers,
        "attention_heads": shape.vision_heads,
        "intermediate_layers_indices": list(shape.collected_layers),
        "vision_output_dim": shape.vision_width * (1 + len(shape.collected_layers)),
        "image_size": SIZE,
        "patch_size": PATCH,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }


def _text_config(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.text_width,
        "intermediate_size": shape.text_mlp,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_heads,
        "num_key_value_heads": shape.key_value_heads,
        "cross_attention_layers": list(shape.cross_attention_layers),
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
    }


def _open_gates(model: MllamaForConditionalGeneration) -> None:
    """Gates start at tanh(0.5); transformers starts them shut, as for a language model trained before."""
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_gate", "mlp_gate", "gate_attn", "gate_ffn")):
            torch.nn.init.constant_(parameter, 0.5)


class Answers:
    """Token ids of a style's prompts and answers, put together on the device from its choices."""

    def __init__(
        self, style: SceneStyle, tokenizer: Any, template: Callable[..., str], device: str, end: str = END
    ) -> None:
        prompt = template(chat(style.prompt), add_generation_prompt=True)
        texts = [[prompt], *(part.texts for part in style.parts), [end]]
        self.tables = [_table(tokenizer, list(column), device) for column in texts]
        self.prompt_length = self.tables[0].shape[1]

    def tokens(self, choices: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels, each (N, length); the prompt and the padding have no labels."""
        first = torch.zeros_like(choices[:, :1])
        columns = torch.cat((first, choices, first), dim=1).unbind(1)
        ids = torch.cat([table[c] for table, c in zip(self.tables, columns, strict=True)], dim=1)
        order = (ids == IGNORED).to(torch.uint8).argsort(dim=1, stable=True)  # padding to the right
        ids = functional.pad(ids.gather(1, order), (0, length), value=IGNORED)[:, :length]
        labels = ids.clone()
        labels[:, : self.prompt_length] = IGNORED
        return ids.clamp(min=0), labels

    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return sum(table.shape[1] for table in self.tables)


def _table(tokenizer: Any, texts: list[str], device: str) -> Tensor:
    """(texts, longest) token ids, filled up with IGNORED."""
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows], device=device)


@dataclass(frozen=True)
class Batch:
    """pixel_values: (N, 1, 1, 3, SIZE, SIZE); input_ids, labels: (N, L); sizes: scenes of each style."""

    pixel_values: Tensor
    input_ids: Tensor
    labels: Tensor
    sizes: tuple[int, ...]


def batches(recipe: Recipe, device: str, reader: Any = None) -> Iterator[Batch]:
    """Endless batches, batch n from seed TRAINING_SEED + n. reader: the processor; None for the demo's."""
    pro: Any = processor() if reader is None else reader
    end = END if reader is None else pro.tokenizer.eos_token
    answers = [Answers(style, pro.tokenizer, pro.apply_chat_template, device, end) for style in STYLES]
    length = max(a.longest() for a in answers)
    sizes = tuple(recipe.batch * share // sum(SHARES) for share in SHARES)
    step = 0
    while True:
        keys = scene_keys(TRAINING_SEED + step, torch.arange(sum(sizes), device=device))
        draws = uniforms(keys).split(sizes)
        drawn = [s.draw(Dice(d, SPREAD)) for s, d in zip(STYLES, draws, strict=True)]
        rows = [a.tokens(choices, length) for a, (_, choices) in zip(answers, drawn, strict=True)]
        pixels = photograph(torch.cat([image for image, _ in drawn]), keys, GRAIN).float() / 255
        yield Batch(
            pixel_values=((pixels - 0.5) / 0.5)[:, None, None],
            input_ids=torch.cat([ids for ids, _ in rows]),
            labels=torch.cat([labels for _, labels in rows]),
            sizes=sizes,
        )
        step += 1


def compile_layers(model: MllamaForConditionalGeneration) -> None:
    """Compile each transformer layer by itself, which takes seconds where the whole model takes minutes."""
    inner = model.model
    for layers in (
        inner.vision_model.transformer.layers,
        inner.vision_model.global_transformer.layers,
        inner.language_model.layers,
    ):
        for layer in layers:
            layer.compile(dynamic=False)


def answer_losses(model: Any, batch: Batch) -> Tensor:
    """(N, L - 1) cross entropy of each next answer token, 0 where there is no label."""
    ones = torch.ones_like(batch.input_ids)
    image_token = model.config.image_token_index
    sees_image = ((batch.input_ids == image_token).cumsum(1) > 0).long()[:, :, None, None]
    logits = model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        aspect_ratio_ids=ones[:, :1],
        aspect_ratio_mask=ones[:, :1, None],
        cross_attention_mask=sees_image,
        use_cache=False,
    ).logits
    return functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )


def _optimizer(model: Any, recipe: Recipe, device: str) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=device == "cuda")


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to zero; progress: 0 to 1."""
    if progress < recipe.warmup:
        return recipe.learning_rate * progress / recipe.warmup
    done = (progress - recipe.warmup) / (1 - recipe.warmup)
    return recipe.learning_rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2


class Pace:
    """How far a training is: by its steps if their number is given, else by the clock."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Seconds since training began."""
        return time.monotonic() - self._start

    def progress(self, step: int) -> float:
        """Share of the training that is done, from 0; it is over at 1."""
        return step / self.recipe.steps if self.recipe.steps else self.seconds() / self.recipe.seconds


def train(recipe: Recipe, device: str) -> tuple[MllamaForConditionalGeneration, dict[str, Any]]:
    """The trained model in bf16, and what its training took."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.shape).to(device).train()  # pyright: ignore[reportArgumentType]
    if device == "cuda":
        compile_layers(model)
    optimizer = _optimizer(model, recipe, device)
    pace, step, scenes, report = Pace(recipe), 0, 0, {}
    for batch in batches(recipe, device):
        progress = pace.progress(step)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, recipe)
        with torch.autocast(device, dtype=torch.bfloat16):
            losses = answer_losses(model, batch)
        optimizer.zero_grad(set_to_none=True)
        (losses.sum() / (batch.labels != IGNORED).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            report = _progress_report(losses.detach(), batch.sizes)
            print(f"step {step} {pace.seconds():.0f} s {report}", flush=True)
        step, scenes = step + 1, scenes + sum(batch.sizes)
    took = {"steps": step, "seconds": pace.seconds(), "scenes": scenes, "last_nats": report}
    return model.to(torch.bfloat16).eval(), took  # pyright: ignore[reportArgumentType]


def _progress_report(losses: Tensor, sizes: tuple[int, ...]) -> dict[str, float]:
    """Mean nats an answer for each style."""
    parts = losses.sum(1).split(sizes)
    names = (f"{style.kind}/{style.parts[0].texts[0].split()[0]}" for style in STYLES)
    return {name: round(float(part.mean()), 4) for name, part in zip(names, parts, strict=True)}


def main(arguments: list[str]) -> None:
    """Trains, saves, evaluates, and writes training.json."""
    parser = argparse.ArgumentParser(prog="python -m qprobe.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seconds", type=float, default=Recipe.seconds, help="seconds of training")
    parser.add_argument("--steps", type=int, default=None, help="exact number of steps instead")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run(Recipe(steps=options.steps, seconds=options.seconds), options.out, device)


def run(recipe: Recipe, folder: Path, device: str) -> dict[str, Any]:
    """Trains, saves to the folder, evaluates the saved model; returns what training.json holds."""
    model, took = train(recipe, device)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    record = {
        "recipe": asdict(recipe),
        "training": took,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(took), flush=True)
    return record_evaluation(folder, recipe.held_out, device)


if __name__ == "__main__":
    main(sys.argv[1:])
