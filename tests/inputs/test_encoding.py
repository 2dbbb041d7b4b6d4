"""Labels stand on the answers' tokens and their ends, on every architecture, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe.data.conversations import Conversation, Turn
from qprobe.demo import demo_folder
from qprobe.errors import ModelError, SampleError
from qprobe.inputs.batch import tokenizer_of
from qprobe.inputs.encoding import IGNORED, encode_conversations, encoding_problem, render
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from tests import tiny

USER, ANSWER = "what does the image show?", "a cat. what does it show?"


def picture(folder: Path) -> Path:
    path = folder / "a.png"
    path.write_bytes(tiny.picture(1))
    return path


def two_turns(image: Path | None, side: Any = "before") -> Conversation:
    """The image in the second question, so that one answer stands before it and one behind."""
    turns = (
        Turn("system", "be short"),
        Turn("user", USER),
        Turn("assistant", ANSWER),
        Turn("user", "and here?", side if image else None),
        Turn("assistant", "seven"),
    )
    return Conversation(1, turns, image)


def learned(processor: Any, inputs: dict[str, torch.Tensor], row: int = 0) -> list[str]:
    """The stretches of text under labels."""
    labels = inputs["labels"][row].tolist()
    stretches: list[list[int]] = [[]]
    for label, token in zip(labels, inputs["input_ids"][row].tolist(), strict=True):
        assert label in (IGNORED, token)
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(token)
    return [tokenizer_of(processor).decode(x) for x in stretches if x]


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("name", tiny.GENERATING_NAMES)
def test_labels_are_the_answers_and_their_ends(name, side, tiny_folder, tmp_path):
    processor = load_processor(resolve(str(tiny_folder(name))))
    image = picture(tmp_path) if name in tiny.VISION_NAMES else None
    inputs = encode_conversations(processor, [two_turns(image, side)], torch.bfloat16)
    assert learned(processor, inputs) == [f"{ANSWER}<|end|>", "seven<|end|>"]
    assert inputs["labels"].shape == inputs["input_ids"].shape
    if image is not None:
        assert inputs["pixel_values"].dtype == torch.bfloat16


def test_the_demo_learns_its_answer(tmp_path):
    processor = load_processor(resolve(str(demo_folder())))
    one = Conversation(
        1, (Turn("user", "What?", "before"), Turn("assistant", "This mug.")), picture(tmp_path)
    )
    text = learned(processor, encode_conversations(processor, [one], torch.bfloat16))
    assert [x.replace(" ", "") for x in text] == ["Thismug.<|eot_id|>"]


@pytest.mark.parametrize("name", ["mllama", "llava_pixtral", "llama"])
def test_padding_learns_nothing(name, tiny_folder, tmp_path):
    processor = load_processor(resolve(str(tiny_folder(name))))
    image = picture(tmp_path) if name in tiny.VISION_NAMES else None
    short = Conversation(2, (Turn("user", "x", image and "before"), Turn("assistant", "seven")), image)
    inputs = encode_conversations(processor, [two_turns(image), short], torch.bfloat16)
    assert learned(processor, inputs, 0) == [f"{ANSWER}<|end|>", "seven<|end|>"]
    assert learned(processor, inputs, 1) == ["seven<|end|>"]
    assert (inputs["labels"][inputs["attention_mask"] == 0] == IGNORED).all()


def test_a_template_whose_prompt_differs_from_the_answers_head(tiny_folder):
    # As Qwen3's: the prompt for an answer opens a part for thoughts that a given answer does not have.
    tokenizer = load_processor(resolve(str(tiny_folder("llama"))))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|>think: "
    )
    inputs = encode_conversations(tokenizer, [two_turns(None)], torch.bfloat16)
    assert learned(tokenizer, inputs) == [f"{ANSWER}<|end|>", "seven<|end|>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}", "rewrites earlier turns"),
        ("{% for m in messages %}{{ m['role'] }};{% endfor %}", "leaves out the answer"),
        ("{{ raise_exception('only one turn') }}", "does not take it"),
    ],
)
def test_a_template_that_loses_turns_is_bad_data(template, said, tiny_folder):
    tokenizer = load_processor(resolve(str(tiny_folder("llama"))))
    tokenizer.chat_template = template
    assert said in str(encoding_problem(tokenizer, two_turns(None), torch.bfloat16, 512))


def test_no_template_at_all_is_the_models_fault(tiny_folder):
    tokenizer = load_processor(resolve(str(tiny_folder("llama"))))
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        render(tokenizer, two_turns(None))


def test_what_does_not_fit_is_named_and_never_cut(tiny_folder, tmp_path):
    processor = load_processor(resolve(str(tiny_folder("mllama"))))
    image, dtype = picture(tmp_path), torch.bfloat16
    length = encode_conversations(processor, [two_turns(image)], dtype)["input_ids"].shape[1]
    assert encoding_problem(processor, two_turns(image), dtype, length) is None
    assert "tokens, more than --max-length" in str(
        encoding_problem(processor, two_turns(image), dtype, length - 1)
    )
    text_only = load_processor(resolve(str(tiny_folder("llama"))))
    assert "reads text only" in str(encoding_problem(text_only, two_turns(image), dtype, 512))
    marked = Conversation(1, (Turn("user", "<|image|> hi", "before"), Turn("assistant", "yes")), image)
    assert "stands for an image" in str(encoding_problem(processor, marked, dtype, 512))
    for turns in (("what?<|end|>", "yes"), ("what?", "<|end|>yes")):
        ended = Conversation(1, (Turn("user", turns[0]), Turn("assistant", turns[1])))
        assert "contains <|end|>" in str(encoding_problem(processor, ended, dtype, 512))
    with pytest.raises(SampleError, match="--batch-size 1"):
        encode_conversations(processor, [two_turns(image), two_turns(None)], dtype)
