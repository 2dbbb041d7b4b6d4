"""Labels stand on the answers' tokens and their ends, on every architecture, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe.data.conversation import Conversation
from qprobe.data.reasons import Refused
from qprobe.data.turns import samples_of
from qprobe.demo.folder import demo_folder
from qprobe.errors import SampleError
from qprobe.inputs.batch import prompt_text, tokenizer_of
from qprobe.inputs.decoder import Layout
from qprobe.inputs.encoding import (
    IGNORED,
    encode_conversations,
    encoding_problem,
    render,
    rows_to_learn,
)
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from qprobe.records import Part, Role, Turn
from tests import tiny
from tests.reading import encode

USER, ANSWER = "what does the image show?", "a cat. what does it show?"


def picture(folder: Path) -> Path:
    path = folder / "a.png"
    path.write_bytes(tiny.picture(1))
    return path


def talk(*turns: tuple[Role, list[Part | None]]) -> Conversation:
    return Conversation(1, "line 1", tuple(Turn(role, tuple(x for x in p if x)) for role, p in turns))


def two_turns(image: Path | None, side: Any = "before") -> Conversation:
    """The image in the second question, so that one answer stands before it and one behind."""
    asked: list[Part | None] = [image, "and here?"] if side == "before" else ["and here?", image]
    return talk(
        ("system", ["be short"]),
        ("user", [USER]),
        ("assistant", [ANSWER]),
        ("user", asked),
        ("assistant", ["seven"]),
    )


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
    one = talk(("user", [picture(tmp_path), "What?"]), ("assistant", ["This mug."]))
    text = learned(processor, encode_conversations(processor, [one], torch.bfloat16))
    assert [x.replace(" ", "") for x in text] == ["Thismug.<|eot_id|>"]


@pytest.mark.parametrize("name", ["mllama", "llava_pixtral", "llama"])
def test_padding_learns_nothing(name, tiny_folder, tmp_path):
    processor = load_processor(resolve(str(tiny_folder(name))))
    image = picture(tmp_path) if name in tiny.VISION_NAMES else None
    short = talk(("user", [image, "x"]), ("assistant", ["seven"]))
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
        (
            "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}",
            "leaves out or changes the text of turn 1",
        ),
        ("{% for m in messages %}{{ m['role'] }};{% endfor %}", "leaves out or changes the text of turn 1"),
        ("{{ raise_exception('only one turn') }}", "it fails (only one turn)"),
    ],
)
def test_a_template_that_loses_turns_is_bad_data(template, said, tiny_folder):
    tokenizer = load_processor(resolve(str(tiny_folder("llama"))))
    tokenizer.chat_template = template
    assert said in str(encoding_problem(tokenizer, two_turns(None), torch.bfloat16, 512))


def test_what_does_not_fit_is_named_and_never_cut(tiny_folder, tmp_path):
    processor = load_processor(resolve(str(tiny_folder("mllama"))))
    image, dtype = picture(tmp_path), torch.bfloat16
    length = encode_conversations(processor, [two_turns(image)], dtype)["input_ids"].shape[1]
    assert encoding_problem(processor, two_turns(image), dtype, length) is None
    assert "tokens, more than --max-length" in str(
        encoding_problem(processor, two_turns(image), dtype, length - 1)
    )
    few = Layout(positions=length - 1)
    assert encoding_problem(processor, two_turns(image), dtype, length, few) == few.excess(length)
    text_only = load_processor(resolve(str(tiny_folder("llama"))))
    assert "reads text only" in str(encoding_problem(text_only, two_turns(image), dtype, 512))
    marked = talk(("user", [image, "<|image|> hi"]), ("assistant", ["yes"]))
    assert "stands for an image" in str(encoding_problem(processor, marked, dtype, 512))
    for turns in (("what?<|end|>", "yes"), ("what?", "<|end|>yes")):
        ended = talk(("user", [turns[0]]), ("assistant", [turns[1]]))
        assert "contains <|end|>" in str(encoding_problem(processor, ended, dtype, 512))
    with pytest.raises(SampleError, match="--batch-size 1"):
        encode_conversations(processor, [two_turns(image), two_turns(None)], dtype)


def test_a_template_that_takes_thoughts_out_of_earlier_answers_learns_each_in_its_own_row(tiny_folder):
    # As reasoning models': only the last answer keeps what stands before </think>.
    tokenizer = load_processor(resolve(str(tiny_folder("llama"))))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}",
    )
    first, second = "<think>a b</think>a cat.", "<think>c</think>seven"
    one = talk(("user", [USER]), ("assistant", [first]), ("user", ["and?"]), ("assistant", [second]))
    with pytest.raises(Refused, match="rewrites earlier turns"):
        render(tokenizer, one)
    rows = rows_to_learn(tokenizer, one)
    texts = [learned(tokenizer, encode_conversations(tokenizer, [x], torch.bfloat16)) for x in rows]
    assert texts == [[f"{first}<|end|>"], [f"{second}<|end|>"]]
    assert "a b" not in render(tokenizer, rows[1]).text and "a cat." in render(tokenizer, rows[1]).text


def test_only_the_turns_that_count_are_learned(tiny_folder):
    tokenizer = load_processor(resolve(str(tiny_folder("llama"))))
    one = two_turns(None)
    turns = tuple(replace(x, learned=x.text != ANSWER) for x in one.turns)
    inputs = encode_conversations(tokenizer, [replace(one, turns=turns)], torch.bfloat16)
    assert learned(tokenizer, inputs) == ["seven<|end|>"]


def test_a_template_that_trims_the_first_content_gets_it_as_a_string(tiny_folder, tmp_path):
    # Given a list it would trim, and train on, its Python source.
    processor = load_processor(resolve(str(tiny_folder("mllama"))))
    template = processor.chat_template
    head = "{{ bos_token }}{{ '<|user|>' + (messages[0]['content'] | string | trim) + '<|end|>' }}"
    processor.chat_template = template.replace("{{ bos_token }}", head).replace(
        "in messages", "in messages[1:]", 1
    )
    image = picture(tmp_path)
    text = render(processor, two_turns(image)).text
    assert "be short" in text and "'type'" not in text
    inputs = encode_conversations(processor, [two_turns(image)], torch.bfloat16)
    assert learned(processor, inputs) == [f"{ANSWER}<|end|>", "seven<|end|>"]


@pytest.mark.parametrize("name", tiny.VISION_NAMES)
def test_two_images_between_words_are_read_where_they_stand(name, tiny_folder):
    processor = load_processor(resolve(str(tiny_folder(name))))
    asked: list[Part | None] = ["the left ", tiny.picture(0), " or right ", tiny.picture(1), " bar?"]
    one = talk(("system", ["be short"]), ("user", asked), ("assistant", ["seven"]))
    inputs = encode_conversations(processor, [one], torch.bfloat16)
    assert learned(processor, inputs) == ["seven<|end|>"]
    (sample,) = samples_of(one, "each")
    measured = encode(processor, [sample], torch.bfloat16)
    assert measured.inputs.keys() == inputs.keys() - {"labels"}
    assert all(torch.equal(value, inputs[key]) for key, value in measured.inputs.items())
    text = prompt_text(processor, sample).replace(processor.image_token, "#")
    order = [text.index(x) for x in ("be short", "the left ", "#", " or right ", " bar?")]
    assert order == sorted(order) and text.count("#") == 2 and text.rindex("#") > order[3]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "llava_pixtral"])
def test_lines_with_and_without_an_image_in_one_batch_are_as_they_are_alone(name, tiny_folder, tmp_path):
    processor = load_processor(resolve(str(tiny_folder(name))))
    image = picture(tmp_path)
    rows = [
        talk(("user", [image, "what?"]), ("assistant", ["a cat"])),
        talk(("user", ["which one is larger?"]), ("assistant", ["seven"])),
        talk(("user", ["and here?", image]), ("assistant", ["a train"])),
    ]
    together = encode_conversations(processor, rows, torch.float32)
    for place, row in enumerate(rows):
        alone = encode_conversations(processor, [row], torch.float32)
        length = alone["input_ids"].shape[1]
        for key in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(together[key][place, :length], alone[key][0]), key
        assert (together["labels"][place, length:] == IGNORED).all()
    assert [learned(processor, together, i) for i in range(3)] == [
        ["a cat<|end|>"], ["seven<|end|>"], ["a train<|end|>"],
    ]  # fmt: skip
