"""Inputs are put together as the processor itself would, and each is made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from qprobe.data.builtin import photographs
from qprobe.inputs.batch import full_text, process, prompt_text
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from qprobe.records import Sample, asked
from tests import tiny


@pytest.mark.parametrize("name", tiny.GENERATING_NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_samples_put_together_equal_a_batch_of_the_processor(
    tiny_folder: Callable[[str], Path], name: str, side: Any
) -> None:
    processor = load_processor(resolve(str(tiny_folder(name))))
    samples = [replace(s, answer="a red bag " * (1 + i)) for i, s in enumerate(tiny.questions(name, 3))]
    processed = ProcessedSamples(processor, torch.bfloat16)
    text = full_text if side == "right" else prompt_text
    for group in processed.batches(samples, 3):
        wanted = process(processor, group, [text(processor, s) for s in group], side)
        found = processed.batch(group).inputs if side == "right" else processed.prompts(group)
        assert found.keys() == {k for k, v in wanted.items() if isinstance(v, Tensor)}
        for key, value in found.items():
            expected = wanted[key].to(torch.bfloat16) if wanted[key].is_floating_point() else wanted[key]
            assert torch.equal(value, expected), key


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by each image file that is opened."""
    found: list[Any] = []
    opened = PIL.Image.open

    def counted(file: Any, *more: Any, **named: Any) -> Any:
        found.append(file)
        return opened(file, *more, **named)

    monkeypatch.setattr(PIL.Image, "open", counted)
    return found


class Counted:
    """A processor that counts its runs."""

    def __init__(self, processor: Any) -> None:
        self._processor, self.runs = processor, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.runs += 1
        return self._processor(*given, **named)


def _six(tiny_folder: Callable[[str], Path]) -> tuple[Counted, list[Sample]]:
    processor = Counted(load_processor(resolve(str(tiny_folder("qwen2_vl")))))
    return processor, list(photographs("what is this?", limit=6).samples)


@pytest.mark.slow
def test_six_images_cost_six_runs_and_decodes_a_stage(tiny_folder: Any, decoded: list[Any]) -> None:
    processor, samples = _six(tiny_folder)
    decoded.clear()
    processed = ProcessedSamples(processor, torch.bfloat16)
    for group in processed.batches(samples, 2):  # answers
        processed.prompts(group)
    assert processor.runs == len(decoded) == 6
    known = [replace(s, answer="a cat") for s in samples]
    for _ in range(3):  # measuring: several passes over the same samples
        for group in processed.batches(known, 2):
            processed.batch(group)
    assert processor.runs == len(decoded) == 12


@pytest.mark.slow
def test_what_has_no_room_is_made_again_and_is_the_same(tiny_folder: Any) -> None:
    processor, samples = _six(tiny_folder)
    ample, none = (ProcessedSamples(processor, torch.bfloat16, room_bytes=room) for room in (2**29, 0))
    for group in ample.batches(samples, 2):
        first, second = ample.batch(group).inputs, none.batch(group).inputs
        assert all(torch.equal(first[key], second[key]) for key in first)
    before = processor.runs
    none.batch(samples[:1])
    assert processor.runs == before + 1
    ample.batch(samples[:1])
    assert processor.runs == before + 1


def test_labels_are_no_input_and_every_token_of_a_text_counts_where_no_mask_is_given(
    tiny_folder: Callable[[str], Path],
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("llama"))

    class Labelling:
        """As PaliGemma's processor adds labels, and SigLIP's tokenizer gives no mask."""

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def __call__(self, text: list[str], **options: Any) -> dict[str, Any]:
            made = dict(tokenizer(text, **options))
            return {"input_ids": made["input_ids"], "labels": made["input_ids"]}

    processed = ProcessedSamples(Labelling(), torch.float32)
    batch = processed.batch([Sample("one", asked("a cat")), Sample("two", asked("a cat and the moon"))])
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [
        len(tokenizer(x)["input_ids"]) for x in ("a cat", "a cat and the moon")
    ]
