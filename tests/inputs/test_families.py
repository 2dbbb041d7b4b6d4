"""Every family's own processor: what is learned and measured is exactly the answers, image or not."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qprobe.data.conversation import Conversation
from qprobe.data.turns import samples_of
from qprobe.errors import SampleError
from qprobe.inputs.batch import ANSWER, UnreadableError, process, tokenizer_of
from qprobe.inputs.encoding import IGNORED, encode_conversations, render, rows_to_learn
from qprobe.inputs.processed import ProcessedSamples
from qprobe.records import Part, Turn
from tests import families, tiny

# transformers 5.23's GLM-4V and PaliGemma hand numpy tensors; can go with the first that converts them.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

MIXED_REFUSED = ("mllama",)  # its cross-attention needs an image in each row
NEEDS_AN_IMAGE = ("paligemma",)
NAMES = tuple(families.RECIPES)


def picture(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


TALL, WIDE = picture(40, 56), picture(56, 28)


def talk(*asked: Part, system: str | None = None, answer: str = "a cat") -> Conversation:
    head = () if system is None else (Turn("system", (system,)),)
    return Conversation(
        1, f"{answer} {asked[-1]!r}", (*head, Turn("user", asked), Turn("assistant", (answer,)))
    )


CASES = {
    "two images": [talk(TALL, TALL, "which?")],
    "between words": [talk("the left ", TALL, " or b?")],
    "a system turn": [talk(TALL, "what?", system="be short")],
    "sizes in a line": [talk("this ", TALL, " or ", WIDE, "?")],
    "sizes in a batch": [talk(TALL, "what?"), talk(WIDE, "and that?", answer="seven")],
    "numbers of images": [talk(TALL, "what?"), talk(TALL, WIDE, "and that?", answer="seven")],
}
MIXED = [
    talk(TALL, "what?"),
    talk("which one is larger?", answer="seven"),
    talk("and ", WIDE, answer="a train"),
]


def plain(family: str) -> Any:
    processor = families.make_processor(family)
    processor.chat_template = None
    return processor


def learned(processor: Any, inputs: dict[str, torch.Tensor], row: int) -> str:
    return tokenizer_of(processor).decode(inputs["input_ids"][row][inputs["labels"][row] != IGNORED]).strip()


def measured(processor: Any, rows: list[Conversation]) -> list[str]:
    """What a scan takes for the answers of `rows`, in their order."""
    samples = [x for row in rows for x in samples_of(row, "each")]
    processed = ProcessedSamples(processor, torch.float32)
    found = {}
    for group in processed.batches(samples, 3):
        batch = processed.batch(group)
        for place, (sample, (start, end)) in enumerate(zip(group, batch.answers, strict=True)):
            assert (batch.kinds[place] == ANSWER).sum() == end - start
            found[id(sample)] = tokenizer_of(processor).decode(batch.inputs["input_ids"][place][start:end])
    return [found[id(x)].strip() for x in samples]


def check(processor: Any, rows: list[Conversation]) -> dict[str, torch.Tensor]:
    """Scan and finetune read the answers, and alone each row is as it is in the batch; the batch's inputs."""
    wanted = [f"{row.turns[-1].text}<|end|>" for row in rows]
    together = encode_conversations(processor, rows, torch.float32)
    assert [learned(processor, together, i) for i in range(len(rows))] == wanted
    assert measured(processor, rows) == wanted
    for place, row in enumerate(rows):
        alone = encode_conversations(processor, [row], torch.float32)
        length = alone["input_ids"].shape[1]
        for key in ("input_ids", "labels"):
            assert torch.equal(together[key][place, :length], alone[key][0])
        assert (together["labels"][place, length:] == IGNORED).all()
    return together


@pytest.mark.parametrize("family", NAMES)
def test_exactly_the_answers_are_learned_and_measured(family: str):
    for rows in CASES.values():
        check(families.processor_of(family), rows)


@pytest.mark.parametrize("family", NAMES)
def test_without_a_template_exactly_the_answers_are_learned_and_measured(family: str):
    processor = plain(family)
    for rows in CASES.values():
        check(processor, rows)


@pytest.mark.parametrize("family", [x for x in NAMES if x not in NEEDS_AN_IMAGE])
def test_lines_of_text_alone_share_a_batch_with_images_or_are_refused_by_name(family: str):
    processor = families.processor_of(family)
    if family in MIXED_REFUSED:
        assert measured(processor, MIXED) == ["a cat<|end|>", "seven<|end|>", "a train<|end|>"]
        with pytest.raises(SampleError, match="mixes lines with and without an image"):
            encode_conversations(processor, MIXED, torch.float32)
    else:
        check(processor, MIXED)


def test_a_line_of_text_alone_is_named_where_the_processor_takes_none():
    with pytest.raises(UnreadableError, match="`images` are expected"):
        encode_conversations(families.processor_of("paligemma"), MIXED, torch.float32)


@pytest.mark.parametrize("family", [x for x in NAMES if x not in NEEDS_AN_IMAGE])
@pytest.mark.parametrize("case", ["sizes in a batch", "numbers of images"])
def test_rows_put_together_equal_a_batch_of_the_processor(family: str, case: str):
    processor, rows = families.processor_of(family), CASES[case]
    samples = [samples_of(x, "each")[0] for x in rows]
    texts = [render(processor, x).text for x in rows]
    wanted = process(processor, samples, texts, "right")
    found = encode_conversations(processor, rows, torch.float32)
    assert found.keys() - {"labels"} == {k for k, v in wanted.items() if isinstance(v, torch.Tensor)}
    for key in found.keys() - {"labels"}:
        assert torch.equal(found[key], wanted[key].to(found[key].dtype)), key


def test_paligemma_reads_its_answer_causally_behind_the_line_break():
    # Token type 1 is what its training masks causally; a 0 would let each answer token see the whole answer.
    processor = families.processor_of("paligemma")
    inputs = encode_conversations(processor, CASES["sizes in a batch"], torch.float32)
    assert torch.equal(inputs["token_type_ids"] == 1, inputs["labels"] != IGNORED)
    ids = inputs["input_ids"][0][inputs["labels"][0] == IGNORED]
    text = tokenizer_of(processor).decode(ids, skip_special_tokens=False)
    assert text.startswith("<image>" * 4 + "<|bos|>what?\n")


def test_images_of_several_sizes_train_in_one_batch_with_pixtrals_tower():
    processor = families.processor_of("llava_pixtral")
    rows = [*CASES["sizes in a batch"], *CASES["sizes in a line"], MIXED[1]]
    inputs = encode_conversations(processor, rows, torch.float32)
    torch.manual_seed(0)
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(tiny.llava_pixtral_config()).float()
    with torch.no_grad():
        together = model(**inputs).logits
        for place, row in enumerate(rows):
            alone = encode_conversations(processor, [row], torch.float32)
            alone.pop("labels")
            length = alone["input_ids"].shape[1]
            assert torch.allclose(together[place, :length], model(**alone).logits[0], atol=1e-4)
    model(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_padded_images_of_one_batch_of_a_scan_have_equally_many_rows():
    processed = ProcessedSamples(families.processor_of("llava_pixtral"), torch.float32)
    rows = [talk(TALL, TALL, "a"), talk(TALL, WIDE, "b"), talk(TALL, WIDE, "c"), talk(WIDE, TALL, "d")]
    samples = [samples_of(x, "each")[0] for x in rows]
    groups = processed.batches(samples, 4)
    assert [[x.prompt for x in group] for group in groups] == [["a"], ["b", "c"], ["d"]]


TEMPLATES = {
    "trims the first content": (
        "{{ bos_token }}",
        "{{ bos_token }}{{ '<|user|>' + (messages[0]['content'] | string | trim) + '<|end|>' }}",
    ),
    "strips reasoning": (
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}",
    ),
    "refuses system turns": (
        "{{ bos_token }}",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ bos_token }}",
    ),
}  # fmt: skip


@pytest.fixture(params=[x for x in NAMES if x not in NEEDS_AN_IMAGE])
def own(request: pytest.FixtureRequest) -> Any:
    """A processor whose template a test may change."""
    return families.make_processor(request.param)


def test_templates_of_the_real_world_teach_the_answers(own: Any):
    template = own.chat_template
    first, second = "<think>a b</think>a cat", "<think>c</think>seven"
    two = replace(
        talk("see ", TALL, " here?", answer=first),
        turns=(*talk("see ", TALL, " here?", answer=first).turns, *talk("and?", answer=second).turns),
    )

    own.chat_template = template.replace(*TEMPLATES["trims the first content"]).replace(
        "in messages", "in messages[1:]", 1
    )
    check(own, CASES["a system turn"])

    own.chat_template = template.replace(*TEMPLATES["strips reasoning"]).replace(
        "{{ part['text'] }}", "{{ part['text'] if loop.last else part['text'] }}"
    )
    rows = rows_to_learn(own, two)
    texts = [learned(own, encode_conversations(own, [x], torch.float32), 0) for x in rows]
    assert "".join(texts).count("<|end|>") == 2 and texts[-1].endswith(f"{second}<|end|>")
    assert f"{first}<|end|>" in texts[0]

    own.chat_template = template.replace(*TEMPLATES["refuses system turns"])
    check(own, CASES["between words"])
    with pytest.raises(Exception, match="no system role"):
        render(own, CASES["a system turn"][0])


def test_without_a_template_each_answer_is_a_line_of_its_own_as_in_a_scan():
    processor = plain("qwen2_vl")
    one = replace(
        talk(TALL, "what?"), turns=(*talk(TALL, "what?").turns, *talk("and?", answer="seven").turns)
    )
    rows = rows_to_learn(processor, one)
    texts = [render(processor, x).text for x in rows]
    assert texts == ["<|image_pad|>what? a cat<|end|>", "<|image_pad|>what?\na cat\nand? seven<|end|>"]
    assert measured(processor, [one]) == ["a cat<|end|>", "seven<|end|>"]
