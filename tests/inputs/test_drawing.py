"""Texts that a model draws itself."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Blip2ForConditionalGeneration

from qprobe.errors import ModelError
from qprobe.inputs import drawing
from qprobe.inputs.batch import ANSWER, TEXT
from qprobe.inputs.drawing import draw_texts, refuse_undrawable, text_batches, vocabulary_of
from qprobe.loading.reference import load_reference
from tests import tiny
from tests.sequences import blip2_opt

TinyFolder = Callable[[str], Path]
CPU = torch.device("cpu")


@pytest.fixture
def llama(tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(drawing, "TOKENS", 6)
    found = load_reference(str(tiny_folder("llama")), "cpu")
    found.model.float()
    return found


def test_each_token_is_drawn_from_the_models_own_distribution(llama: Any, monkeypatch: pytest.MonkeyPatch):
    # Of texts that go on from the first token: frequencies of the next one are the model's probabilities.
    monkeypatch.setattr(drawing, "TOKENS", 1)
    model, words = llama.model, vocabulary_of(llama.model, llama.processor)
    texts = draw_texts(model, llama.processor, 8000, 0, CPU)
    drawn = torch.tensor([row[-1] for row in texts[0::2]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[words.begin]])).logits[0, -1, words.drawable]
    wanted = logits.double().softmax(-1)
    found = torch.bincount(drawn, minlength=tiny.VOCAB)[words.drawable].double() / len(drawn)
    errors = (wanted * (1 - wanted) / len(drawn)).sqrt()
    assert ((found - wanted).abs() <= 4.5 * errors + 2 / len(drawn)).all()
    flat = torch.full_like(wanted, 1 / len(wanted))  # which this test would notice
    assert ((flat - wanted).abs() > 4.5 * errors + 2 / len(drawn)).sum() > 20


def test_tokens_depend_on_those_before_them_as_in_the_model(llama: Any):
    # On average a token is as likely as tokens drawn there are, and likelier than those of another text.
    words = vocabulary_of(llama.model, llama.processor)
    ids = torch.tensor(draw_texts(llama.model, llama.processor, 64, 0, CPU))
    assert words.begin is not None
    read = torch.cat([torch.full((64, 1), words.begin), ids[:, :-1]], dim=1)
    barred = torch.full((tiny.VOCAB,), -torch.inf).index_fill(0, words.drawable, 0.0)
    with torch.no_grad():
        logs = (llama.model(input_ids=read).logits + barred).log_softmax(-1)[:, 1:]  # the first is forced
    own, other = (logs.gather(-1, x[:, 1:, None]).squeeze(-1) for x in (ids, ids.roll(1, 0)))
    expected = (logs.exp() * logs.clamp_min(-1e9)).sum(-1)
    error = (own - expected).std() / own.numel() ** 0.5
    assert abs((own - expected).mean()) < 4 * error < (own - other).mean()


def test_the_same_seed_draws_the_same_texts_and_another_one_others(llama: Any):
    first, again, other = (draw_texts(llama.model, llama.processor, 4, seed, CPU) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 4
    assert {len(row) for row in first} == {6}


def test_every_second_text_has_a_token_at_random_next_and_no_mark_of_the_model_is_drawn(llama: Any):
    words = vocabulary_of(llama.model, llama.processor)
    # Of the model's own the second token would always be the same one.
    head = llama.model.get_output_embeddings().weight.data
    head.zero_()
    texts = draw_texts(llama.model, llama.processor, 40, 0, CPU)
    assert words.is_read == (texts[0][0] == words.begin)
    flat = {x for row in texts for x in row[1:]}
    assert flat <= set(words.drawable.tolist()) and not flat & {tiny.UNK, tiny.BOS, tiny.PAD, tiny.END}
    second = {row[1 if words.is_read else 0] for row in texts[1::2]}
    assert len(second) > 15


def test_texts_keep_the_first_token_where_the_tokenizer_puts_it_before_every_text(
    llama: Any, monkeypatch: pytest.MonkeyPatch
):
    words = vocabulary_of(llama.model, llama.processor)
    bare = draw_texts(llama.model, llama.processor, 4, 0, CPU)
    monkeypatch.setattr(drawing, "vocabulary_of", lambda *_: replace(words, is_read=not words.is_read))
    found = draw_texts(llama.model, llama.processor, 4, 0, CPU)
    assert not words.is_read and found == tuple((words.begin, *row[:-1]) for row in bare)


def test_settings_of_the_models_own_generation_take_no_part(llama: Any):
    changed = deepcopy(llama.model)
    own = changed.generation_config
    own.do_sample, own.temperature, own.top_k, own.top_p, own.repetition_penalty = True, 0.1, 1, 0.1, 5.0
    own.eos_token_id, own.suppress_tokens = list(range(100, 200)), list(range(50, 300))
    own.begin_suppress_tokens, own.bad_words_ids = list(range(300, 350)), [[350], [351]]
    own.forced_bos_token_id, own.max_time, own.stop_strings = 60, 1e-9, ["e"]
    found, wanted = (draw_texts(x, llama.processor, 4, 0, CPU) for x in (changed, llama.model))
    assert found == wanted and changed.generation_config is own


def test_a_text_begins_with_no_word_that_a_config_names_by_default(llama: Any):
    # As Llama's config says 1 of a tokenizer without a token that texts begin with.
    tokenizer = deepcopy(llama.processor)
    tokenizer.bos_token = None
    config = deepcopy(llama.model.config)
    config.bos_token_id = 100
    model = SimpleNamespace(config=config, get_output_embeddings=llama.model.get_output_embeddings)
    words = vocabulary_of(model, tokenizer)
    assert words.begin == tiny.END and 100 in words.drawable.tolist()


@pytest.mark.parametrize("name", ["mllama", "qwen2_vl", "llava_pixtral"])
def test_a_vision_language_model_draws_texts_without_an_image(
    name: str, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(drawing, "TOKENS", 5)
    reference = load_reference(str(tiny_folder(name)), "cpu")
    refuse_undrawable(reference.model)
    texts = draw_texts(reference.model, reference.processor, 3, 0, CPU)
    (batch,) = text_batches(reference.processor, texts, 4, 0.5)
    with torch.no_grad():
        logits = reference.model(**batch.inputs).logits
    assert logits.shape[:2] == (3, 5) and bool(logits.isfinite().all())


def test_a_text_is_an_answer_from_its_second_token_on(llama: Any):
    first, second = text_batches(llama.processor, ((7, 8, 9), (9, 8, 7), (7, 9, 8)), 2, 0.25)
    assert first.inputs["input_ids"].tolist() == [[7, 8, 9], [9, 8, 7]] and second.size == 1
    assert first.kinds.tolist() == [[TEXT, ANSWER, ANSWER]] * 2 and first.answers == ((1, 3), (1, 3))
    assert first.weight == second.weight == 0.25
    assert len({x.digest for x in (*first.samples, *second.samples)}) == 3  # which seed their draws


@pytest.mark.parametrize("name", ["bert"])
def test_a_model_that_writes_no_text_from_nothing_is_refused(name: str, tiny_folder: TinyFolder):
    model = load_reference(str(tiny_folder(name)), "cpu").model
    with pytest.raises(ModelError, match=f"{type(model).__name__} does not write texts .* --drawn-texts"):
        refuse_undrawable(model)


def test_a_model_that_wants_an_image_for_each_text_is_refused_before_its_weights_are_read():
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(blip2_opt())
    with pytest.raises(
        ModelError, match=r"Blip2ForConditionalGeneration does not write texts .* Leave it out"
    ):
        refuse_undrawable(model)


def test_what_fails_while_a_text_is_drawn_is_said_with_the_option_that_asked_for_it(
    llama: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(llama.model, "forward", lambda **_given: 1 / 0)
    with pytest.raises(ModelError, match=r"does not write a text from nothing .* Leave out --drawn-texts"):
        draw_texts(llama.model, llama.processor, 2, 0, CPU)
