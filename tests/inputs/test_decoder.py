"""What a decoder behind an encoder reads and is to put out, against sequences that are written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig

from qprobe.data.conversation import Conversation
from qprobe.errors import ModelError
from qprobe.inputs.batch import ANSWER, PAD, TEXT, VISION
from qprobe.inputs.decoder import Decoder, Layout, answer_of, layout_of
from qprobe.inputs.encoding import IGNORED, encode_conversations, rows_to_learn
from qprobe.inputs.processed import ProcessedSamples
from qprobe.records import Sample, Turn, asked
from tests import sequences, tiny
from tests.sequences import IMAGE_TOKENS, tokenizer_with
from tests.tiny import BOS, END

START = tiny.PAD
T5, BART = "$A <|end|>", "<|bos|> $A <|end|>"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("around", "ahead"), [(T5, []), (BART, [BOS]), ("$A", [])])
@pytest.mark.parametrize("ends", [True, False])
def test_an_answer_stands_between_what_the_tokenizer_writes_around_it(around: str, ahead: list, ends: bool):
    tokenizer = tokenizer_with(around)
    own = ids_of(tokenizer, "a red bag")
    found = answer_of(tokenizer, Decoder(START), Sample("a", asked("?"), "a red bag", ends=ends))
    assert list(found.ids) == [*ahead, *own, *([END] if ends else [])]
    assert found.begin == len(ahead)


def test_what_generation_forces_takes_the_place_of_what_the_tokenizer_writes_ahead():
    tokenizer = tokenizer_with(BART)
    found = answer_of(tokenizer, Decoder(START, forced=9), Sample("a", asked("?"), "a bag"))
    assert list(found.ids) == [9, *ids_of(tokenizer, "a bag"), END]
    assert found.begin == 1


@pytest.mark.parametrize("answer", [None, ""])
def test_without_an_answer_nothing_counts(answer: str | None):
    tokenizer = tokenizer_with(BART)
    assert answer_of(tokenizer, Decoder(START), Sample("a", asked("?"), answer)).ids == (BOS,)
    batch = ProcessedSamples(tokenizer, torch.float32, Layout(decoder=Decoder(START))).batch(
        [Sample("a", asked("?"), answer)]
    )
    assert batch.answer_tokens == 0
    assert batch.inputs["decoder_input_ids"].tolist() == [[START]]


def test_the_encoder_reads_the_prompt_and_the_decoder_the_answer_moved_by_one():
    tokenizer = tokenizer_with(BART)
    long, short = ids_of(tokenizer, "the left bar is larger"), ids_of(tokenizer, "no")
    samples = [
        Sample("long", asked("which one?"), "the left bar is larger"),
        Sample("short", asked("is there a crack at bolt hole number seven?"), "no"),
    ]
    batch = ProcessedSamples(tokenizer, torch.float32, Layout(decoder=Decoder(START))).batch(samples)
    prompts = [ids_of(tokenizer, s.prompt) for s in samples]
    for row, prompt in enumerate(prompts):
        length = int(batch.inputs["attention_mask"][row].sum())
        assert batch.inputs["input_ids"][row, :length].tolist() == [BOS, *prompt, END]
        assert set(batch.kinds[row, :length].tolist()) == {TEXT}
        assert set(batch.kinds[row, length:].tolist()) <= {PAD}
    read = batch.inputs["decoder_input_ids"]
    assert read[0, : len(long) + 2].tolist() == [START, BOS, *long]
    assert read[1, : len(short) + 2].tolist() == [START, BOS, *short]
    assert batch.decoder_kinds is not None
    assert (batch.decoder_kinds == ANSWER).sum(dim=1).tolist() == [len(long) + 2, len(short) + 2]
    # the begin that the tokenizer writes is read and put out, but is no answer; the end is one
    assert batch.answers == ((2, 3 + len(long)), (2, 3 + len(short)))
    assert batch.answer_tokens == len(long) + len(short) + 2


def test_the_two_sequences_of_a_batch_never_have_one_length():
    tokenizer = tokenizer_with(BART)
    processed = ProcessedSamples(tokenizer, torch.float32, Layout(decoder=Decoder(START)))
    # BOS, prompt, END against START, BOS, answer: as long where prompt and answer are the same text
    batch = processed.batch([Sample("a", asked("a red bag"), "a red bag")])
    assert batch.decoder_kinds is not None
    assert batch.decoder_kinds.shape[1] == batch.kinds.shape[1] + 1
    assert batch.decoder_kinds[0, -1] == PAD
    for kinds in (batch.kinds, batch.decoder_kinds):
        assert batch.kinds_of(kinds.shape[1]) is kinds
    assert batch.kinds_of(1) is None


def test_florence_2_writes_the_tokens_of_an_image_itself():
    (processor,) = sequences.florence2_processor()
    tokenizer, image = processor.tokenizer, tiny.picture(0)
    layout = Layout((processor.image_token_id,), Decoder(END))
    batch = ProcessedSamples(processor, torch.float32, layout).batch(
        [Sample("a", asked("a cat", image), "<loc_1> a cat")]
    )
    marks = [processor.image_token_id] * IMAGE_TOKENS
    assert batch.inputs["input_ids"].tolist() == [[*marks, BOS, *ids_of(tokenizer, "a cat"), END]]
    assert batch.kinds[0].tolist().count(VISION) == IMAGE_TOKENS
    place = tokenizer.convert_tokens_to_ids("<loc_1>")
    assert batch.inputs["decoder_input_ids"][0, :3].tolist() == [END, BOS, place]


@pytest.mark.parametrize(("around", "decoder"), [(T5, Decoder(START)), ("<|bos|> $A", None)])
def test_blip_2_writes_the_tokens_of_an_image_itself(around: str, decoder: Decoder | None):
    (processor,) = sequences.blip2_processor(around)
    tokenizer, mark = processor.tokenizer, tiny.FIRST_MARKER
    batch = ProcessedSamples(processor, torch.float32, Layout(mark, decoder)).batch(
        [Sample("a", asked("a cat", tiny.picture(0)), "a red bag")]
    )
    text = "a cat" if decoder is not None else "a cat a red bag<|end|>"
    framed = tokenizer(text)["input_ids"]
    assert batch.inputs["input_ids"].tolist() == [[mark] * sequences.QUERIES + framed]
    assert batch.kinds[0].tolist().count(VISION) == sequences.QUERIES
    assert batch.answer_tokens == len(ids_of(tokenizer, " a red bag" if decoder is None else "a red bag")) + 1


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_training_reads_what_transformers_makes_of_the_labels(name: str):
    recipe = sequences.RECIPES[name]
    (tokenizer,) = recipe.processor()
    with torch.device("meta"):
        model: Any = getattr(transformers, recipe.architecture)(recipe.config())
    turns = (Turn("user", ("a red bag",)), Turn("assistant", ("no, a blue cotton shirt",)))
    one = Conversation(1, "a", turns)
    two = replace(one, turns=(turns[0], Turn("assistant", ("no",))))
    found = encode_conversations(tokenizer, [one, two], torch.float32, layout_of(model).decoder)
    shifted = model.prepare_decoder_input_ids_from_labels(found["labels"].clone())
    learned = found["labels"] != IGNORED
    assert torch.equal(found["decoder_input_ids"][learned], shifted[learned])
    for row, turn in enumerate((one.turns[1], two.turns[1])):
        labels = found["labels"][row][learned[row]].tolist()
        assert labels == tokenizer(text_target=turn.text)["input_ids"]


def test_a_decoder_learns_one_answer_at_a_time():
    said = [("user", "a bag?"), ("assistant", "no"), ("user", "a cat?"), ("assistant", "yes")]
    one = Conversation(1, "a", tuple(Turn(role, (text,)) for role, text in said))
    first, second = rows_to_learn(tokenizer_with(T5), one, Decoder(START))
    assert [len(x.turns) for x in (first, second)] == [2, 4]
    found = encode_conversations(tokenizer_with(T5), [second], torch.float32, Decoder(START))
    assert found["labels"].tolist() == [[*ids_of(tokenizer_with(T5), "yes"), END]]


def test_a_decoder_begins_as_the_generation_config_says():
    config = sequences.RECIPES["bart"].config()
    with torch.device("meta"):
        model: Any = transformers.BartForConditionalGeneration(config)
    assert layout_of(model).decoder == Decoder(END)
    model.generation_config = GenerationConfig(decoder_start_token_id=7, forced_bos_token_id=5)
    assert layout_of(model).decoder == Decoder(7, forced=5)


def test_configs_that_do_not_say_how_a_decoder_begins_are_refused():
    config = transformers.T5Config(d_model=32, num_layers=1)
    config.decoder_start_token_id = config.bos_token_id = None
    with torch.device("meta"):
        model: Any = transformers.T5ForConditionalGeneration(config)
    model.generation_config = None
    with pytest.raises(ModelError, match="do not say what its decoder begins with"):
        layout_of(model)


def test_models_of_one_sequence_have_no_decoder():
    class Takes:
        def __init__(self, config: Any) -> None:
            self.config = config

        def forward(self, input_ids: Any, decoder_input_ids: Any = None) -> None:
            """As BLIP-2 with a decoder alone."""

    config = PreTrainedConfig(image_token_id=5)
    assert layout_of(Takes(config)) == Layout((5,))


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("BertForMaskedLM", 24),
        ("RobertaForMaskedLM", 22),
        ("OPTForCausalLM", 24),
        ("BartModel", 24),
        ("T5Model", None),
    ],
)
def test_a_model_reads_as_many_tokens_as_it_has_positions(kind: str, most: int | None):
    made = getattr(transformers, kind)
    config = made.config_class(
        vocab_size=99, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2
    )
    for key, value in {"max_position_embeddings": 24, "num_hidden_layers": 1, "num_layers": 1}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    model = made(config).eval()
    found = layout_of(model)
    assert found.positions == most
    if most is None:
        assert found.excess(10**6) is None
        return
    ids = torch.full((1, most + 1), 5)
    model(ids[:, :-1])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)
    assert found.excess(most) is None
    assert found.excess(most + 1) == f"it has {most + 1} tokens, and the model has positions for {most}"


def test_a_sample_longer_than_the_positions_is_refused_with_its_length():
    tokenizer = tokenizer_with("$A")
    sample = Sample("a", asked("a red bag"), "a red bag")
    length = ProcessedSamples(tokenizer, torch.float32).batch([sample]).inputs["input_ids"].shape[1]
    for positions, refused in ((length, None), (length - 1, Layout(positions=length - 1).excess(length))):
        found = ProcessedSamples(tokenizer, torch.float32, Layout(positions=positions)).refusal(sample)
        assert found == refused
