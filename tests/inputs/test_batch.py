"""Batches mark answer tokens, pads and vision tokens; answers are the reference's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qprobe.data.builtin import photographs
from qprobe.errors import SampleError
from qprobe.inputs.batch import ANSWER, PAD, VISION, tokenizer_of, vision_token_ids
from qprobe.loading.reference import Reference, load_reference
from qprobe.records import Sample, asked
from tests import tiny
from tests.reading import answered, batches, encode

Load = Callable[[str], Reference]


@pytest.fixture(scope="module")
def load(tiny_folder: Callable[[str], Path]) -> Load:
    return lambda name: load_reference(str(tiny_folder(name)), "cpu")


@pytest.mark.parametrize("name", ["mllama", "qwen2_vl", "llava_pixtral", "llama"])
def test_the_answer_span_decodes_to_the_answer(load: Load, name: str) -> None:
    reference = load(name)
    samples = [replace(s, answer=a) for s, a in zip(_samples(name), ("a red bag", "seven"), strict=True)]
    tokenizer = tokenizer_of(reference.processor)
    for group in batches(reference.processor, samples, 2):
        batch = encode(reference.processor, group, torch.bfloat16, vision_token_ids(reference.model.config))
        for i, (sample, (start, end)) in enumerate(zip(group, batch.answers, strict=True)):
            ids = batch.inputs["input_ids"][i]
            assert tokenizer.decode(ids[start:end], skip_special_tokens=True).strip() == sample.answer
            assert ids[end - 1] == tokenizer.eos_token_id
            assert (batch.kinds[i, start:end] == ANSWER).all()
            assert (batch.kinds[i] == PAD).sum() == len(ids) - end
            assert (batch.inputs["attention_mask"][i] == 0).sum() == len(ids) - end


@pytest.mark.slow
def test_vision_tokens_in_the_text_are_marked(load: Load) -> None:
    reference = load("qwen2_vl")
    (sample, _) = _samples("qwen2_vl")
    batch = encode(reference.processor, [sample], torch.bfloat16, vision_token_ids(reference.model.config))
    grid = batch.inputs["image_grid_thw"][0]
    assert (batch.kinds == VISION).sum() == grid.prod() // 4  # Qwen2-VL merges 2 x 2 patches into a token


def test_answers_of_a_batch_equal_answers_alone(load: Load) -> None:
    reference = load("llama")
    reference.model.float()
    samples = _samples("llama")
    together = answered(reference.model, reference.processor, samples, 6, 2)
    alone = [answered(reference.model, reference.processor, [s], 6, 1)[0] for s in samples]
    assert [s.answer for s in together] == [s.answer for s in alone]


@pytest.mark.slow
def test_images_of_different_processed_shapes_do_not_share_a_batch(load: Load) -> None:
    reference = load("qwen2_vl")
    groups = batches(reference.processor, photographs(limit=6).samples, 6)
    for group in groups:
        batch = encode(reference.processor, group, torch.bfloat16)
        assert len({tuple(g) for g in batch.inputs["image_grid_thw"].tolist()}) == 1 or len(group) == 1
    assert sum(len(g) for g in groups) == 6


def test_an_image_for_a_text_model_is_one_clear_error(load: Load) -> None:
    with pytest.raises(SampleError, match="reads text only"):
        encode(load("llama").processor, photographs(limit=1).samples, torch.bfloat16)


def _samples(name: str) -> list[Sample]:
    if name == "llama":
        return [
            Sample("a", asked("which bag is it")),
            Sample("b", asked("what is the number of the bolt hole here")),
        ]
    return list(photographs("what is this?", limit=2).samples)


def test_a_text_that_the_processor_refuses_is_named(tiny_folder):
    processor = load_reference(str(tiny_folder("mllama")), "cpu").processor
    (good,) = tiny.questions("mllama", 1)
    bad = replace(
        good, id="line 7", turns=asked(f"{processor.image_token} and {processor.image_token}?", *good.images)
    )
    for read in (batches(processor, [good], 2), encode(processor, [good], torch.bfloat16)):
        assert read
    with pytest.raises(SampleError, match=r"processor cannot read 'line 7' \(.*image.*special tokens"):
        batches(processor, [good, bad], 2)
