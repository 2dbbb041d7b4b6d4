"""What a decoder reads behind an encoder of one image: the prompt, and the answer moved by one token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from qprobe.data.conversation import Conversation
from qprobe.errors import SampleError
from qprobe.inputs.answers import Batching, answered
from qprobe.inputs.batch import ANSWER, PAD, TEXT, VISION, UnreadableError
from qprobe.inputs.decoder import layout_of
from qprobe.inputs.encoding import IGNORED, encode_conversations
from qprobe.inputs.processed import ProcessedSamples
from qprobe.records import Sample, Turn
from tests import sequences, tiny
from tests.tiny import BOS, END
from tests.tiny import PAD as PAD_ID

NAMES = ("donut", "trocr", "pix2struct")
STARTS = {"donut": [], "trocr": [BOS], "pix2struct": [PAD_ID]}  # Donut's prompt takes the place of its start


def made(name: str, **changed: Any) -> tuple[Any, Any]:
    """(model without weights, processor); changed: fields of the config."""
    recipe = sequences.RECIPES[name]
    config = recipe.config()
    for key, value in changed.items():
        setattr(config, key, value)
    with torch.device("meta"):
        model: Any = getattr(transformers, recipe.architecture)(config)
    return model, recipe.processor()[0]


def ids_of(processor: Any, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def sample(prompt: str, answer: str | None = "a red bag", images: int = 1, name: str = "a") -> Sample:
    pictures = [tiny.picture(n) for n in range(images)]
    return Sample(name, (Turn("user", (*pictures, prompt)),), answer)


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_reads_prompt_and_answer_and_the_answer_alone_counts(name: str):
    model, processor = made(name)
    batch = ProcessedSamples(processor, torch.float32, layout_of(model)).batch([sample("what is it?")])
    prompt, answer = ids_of(processor, "what is it?"), ids_of(processor, "a red bag")
    read = [*STARTS[name], *prompt, *answer]
    assert batch.inputs["decoder_input_ids"][0, : len(read)].tolist() == read
    ahead = len(read) - len(answer)
    kinds = batch.decoder_kinds
    assert kinds is not None
    assert kinds[0, : len(read)].tolist() == [TEXT] * (ahead - 1) + [ANSWER] * (1 + len(answer))
    assert batch.answers == ((ahead, len(read) + 1),)  # the end is put out and not read
    assert "input_ids" not in batch.inputs


def test_of_patches_that_fill_up_nothing_is_counted():
    model, processor = made("pix2struct")
    batch = ProcessedSamples(processor, torch.float32, layout_of(model)).batch([sample("what?")])
    there = int(batch.inputs["attention_mask"].sum())
    assert 0 < there < batch.kinds.shape[1] == 15
    assert batch.kinds[0].tolist() == [VISION] * there + [PAD] * (15 - there)
    assert batch.kinds_of(15, "vision") is batch.kinds
    assert batch.decoder_kinds is not None
    decoded = batch.decoder_kinds.shape[1]
    assert batch.kinds_of(decoded) is batch.decoder_kinds and batch.kinds_of(decoded, "vision") is None


def test_a_prompt_that_is_drawn_onto_the_image_is_no_text_of_the_decoder(monkeypatch: pytest.MonkeyPatch):
    def drawn(text: str, **_options: Any) -> Image.Image:  # whose font transformers would fetch
        picture = Image.new("RGB", (90, 20), "white")
        ImageDraw.Draw(picture).text((1, 1), text, fill="black")
        return picture

    place = "transformers.models.pix2struct.image_processing_pil_pix2struct.render_text"
    monkeypatch.setattr(place, drawn)
    model, processor = made("pix2struct", is_vqa=True)
    processor.image_processor.is_vqa = True
    processed = ProcessedSamples(processor, torch.float32, layout_of(model))
    one, other = (processed.batch([sample(x)]) for x in ("what?", "where?"))
    read = [PAD_ID, *ids_of(processor, "a red bag")]
    assert one.inputs["decoder_input_ids"][0, : len(read)].tolist() == read
    assert not torch.equal(one.inputs["flattened_patches"], other.inputs["flattened_patches"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("images", "has"), [(0, "no image"), (2, "2 images")])
def test_other_than_one_image_is_refused_by_name(name: str, images: int, has: str):
    model, processor = made(name)
    processed = ProcessedSamples(processor, torch.float32, layout_of(model))
    with pytest.raises(UnreadableError, match=f"'a' cannot be read: it has {has}, and the model's encoder"):
        processed.batch([sample("what?", images=images)])


def test_prompts_of_one_length_are_generated_from_together():
    model, processor = made("trocr")
    processed = ProcessedSamples(processor, torch.float32, layout_of(model))
    samples = [sample(x, None, name=x) for x in ("a cat", "a", "a bag")]
    lengths = {x.id: len(ids_of(processor, x.prompt)) for x in samples}
    groups = processed.batches(samples, 4)
    assert sorted(x.id for group in groups for x in group) == sorted(lengths)
    assert all(len({lengths[x.id] for x in group}) == 1 for group in groups)
    for group in groups:
        wanted = [[BOS, *ids_of(processor, x.prompt)] for x in group]
        assert processed.prompts(group)["decoder_input_ids"].tolist() == wanted


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_are_what_generate_gives_behind_the_prompt(name: str):
    torch.manual_seed(0)
    recipe = sequences.RECIPES[name]
    model = getattr(transformers, recipe.architecture)(recipe.config()).eval()
    tiny.draw_weights(model)
    (processor,) = recipe.processor()
    processed = ProcessedSamples(processor, torch.float32, layout_of(model))
    (found,) = answered(model, processed, [sample("what is it?", None)], Batching(1, 5))
    read = [*STARTS[name], *ids_of(processor, "what is it?")]
    encoded = {k: v for k, v in processed.prompts([found]).items() if k != "decoder_input_ids"}
    steps: list[int] = []
    for _ in range(5):  # without a cache, by hand
        with torch.no_grad():
            logits = model(**encoded, decoder_input_ids=torch.tensor([[*read, *steps]])).logits
        steps.append(int(logits[0, -1].argmax()))
        if steps[-1] == END:
            break
    shown = [x for x in steps if x not in (BOS, PAD_ID, END)]
    assert found.answer == processor.tokenizer.decode(shown)


@pytest.mark.parametrize("name", NAMES)
def test_training_learns_the_answer_and_not_the_prompt(name: str):
    model, processor = made(name)
    turns = (Turn("user", (tiny.picture(0), "what is it?")), Turn("assistant", ("a red bag",)))
    lines = [Conversation(1, "a", turns), Conversation(2, "b", (turns[0], Turn("assistant", ("no",))))]
    found = encode_conversations(processor, lines, torch.float32, layout_of(model).decoder)
    for row, answer in enumerate(("a red bag", "no")):
        learned = found["labels"][row] != IGNORED
        assert found["labels"][row][learned].tolist() == [*ids_of(processor, answer), END]
        first = int(learned.nonzero()[0])
        ahead = [*STARTS[name], *ids_of(processor, "what is it?")]
        assert found["decoder_input_ids"][row, : first + 1].tolist() == ahead


def test_images_of_several_processed_shapes_are_no_batch():
    model, processor = made("pix2struct")
    processed = ProcessedSamples(processor, torch.float32, layout_of(model))
    few = processed.batch([sample("what?", name="few")])
    assert few.size == 1
    processor.image_processor.max_patches = 20
    with pytest.raises(SampleError, match="several processed shapes; pass --batch-size 1"):
        processed.batch([sample("what?", name="few"), sample("where?", name="more")])
