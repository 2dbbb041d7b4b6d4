from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor

from qprobe.demo.evaluate import greedy_answers, inputs, score, score_by_kind
from qprobe.demo.folder import demo_folder
from qprobe.demo.scenes import STYLES, scenes
from qprobe.demo.tokens import chat
from qprobe.demo.train import Recipe, Shape, batches, learning_rate, run
from qprobe.demo.train import processor as untrained_processor
from qprobe.records import Fact, Sample, asked
from tests.demo.conftest import load

TINY = Recipe(
    steps=2,
    batch=32,
    held_out=4,
    shape=Shape(
        vision_width=64,
        vision_layers=2,
        global_layers=1,
        vision_heads=2,
        collected_layers=(0,),
        text_width=64,
        text_layers=2,
        text_heads=2,
        key_value_heads=1,
        text_mlp=64,
        cross_attention_layers=(1,),
    ),
)


def test_the_weights_fit_the_package():
    file = demo_folder() / "model.safetensors"
    assert file.stat().st_size <= 16 * 2**20
    with safe_open(file, "pt") as tensors:
        shapes = [tensors.get_slice(name) for name in tensors.keys()]
        assert {s.get_dtype() for s in shapes} == {"BF16"}
        count = sum(torch.Size(s.get_shape()).numel() for s in shapes)
    assert 4_000_000 <= count <= 8_000_000
    assert json.loads((demo_folder() / "training.json").read_text())["parameters"] == count


def test_every_linear_fills_whole_blocks_and_gates_are_open(demo):
    for name, module in demo.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0, name
    gates = {n: p.item() for n, p in demo.named_parameters() if n.endswith("_gate")}
    assert len(gates) == 4
    assert min(abs(g) for g in gates.values()) > 0.01, gates


@pytest.mark.slow
def test_held_out_facts_are_right_but_not_all(held_out, demo_answers):
    total = score(held_out, demo_answers)
    assert 0.90 <= total.share <= 0.99, score_by_kind(held_out, demo_answers)


def test_processor_delivers_the_pixels_that_training_saw(processor: Any):
    # Training normalizes uint8 pixels as (value / 255 - 0.5) / 0.5, without resampling.
    sample = scenes(1, 3)[0]
    batch = inputs(processor, [sample])
    values = torch.unique(batch["pixel_values"])
    assert batch["pixel_values"].shape == (1, 1, 1, 3, 140, 140)
    assert torch.equal(values, torch.unique((torch.round((values * 0.5 + 0.5) * 255) / 255 - 0.5) / 0.5))


@pytest.mark.slow
def test_training_tokens_are_those_of_the_processor():
    pro: Any = untrained_processor()
    batch = next(batches(Recipe(batch=32), "cpu"))
    assert batch.input_ids.shape[0] == sum(batch.sizes)
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        prompt = int((labels != -100).nonzero()[0])
        answer = pro.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
        style = next(s for s in STYLES if pro.tokenizer.decode(ids[:prompt]).find(s.prompt) > 0)
        text = pro.apply_chat_template(chat(style.prompt), add_generation_prompt=True)
        expected = pro.tokenizer(f"{text}{answer}<|eot_id|>", add_special_tokens=False).input_ids
        assert ids[: len(expected)].tolist() == expected


@pytest.mark.parametrize("text", ["What is at x 3.8?", "Zebra crossing, 12345 km!", "two\nlines", "a  b"])
def test_tokenizer_gives_back_any_ascii_text(processor: Any, text: str):
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert processor.tokenizer.decode(ids) == text


def test_digits_are_tokens_of_their_own(processor: Any):
    ids = processor.tokenizer(" at 40 degrees", add_special_tokens=False).input_ids
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["▁at", "▁4", "0", "▁degrees"]


def test_score_counts_facts_by_kind():
    facts = (Fact("angle", "at 40 degrees"), Fact("state", "is impacted"))
    samples = [Sample("m-0", asked("?"), facts=facts, kind="medical")]
    scores = score_by_kind(samples, ["It is impacted at 45 degrees."])
    assert {name: s.share for name, s in scores.items()} == {
        "medical": 0.5,
        "medical/angle": 0.0,
        "medical/state": 1.0,
    }


def test_learning_rate_rises_and_falls():
    recipe = Recipe()
    assert learning_rate(0.0, recipe) == 0
    assert learning_rate(recipe.warmup, recipe) == pytest.approx(recipe.learning_rate)
    assert learning_rate(1.0, recipe) == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_recipe_makes_two_steps_and_a_folder_that_loads(tmp_path: Path):
    record = run(TINY, tmp_path, "cpu")
    assert record["training"]["steps"] == 2
    assert record["evaluation"]["held_out_scenes"] == 4
    assert json.loads((tmp_path / "training.json").read_text())["recipe"]["batch"] == 32
    answers = greedy_answers(load(tmp_path), AutoProcessor.from_pretrained(tmp_path), scenes(4, 1))
    assert len(answers) == 4
