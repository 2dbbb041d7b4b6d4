"""How a model reads a sample: as one sequence, or the prompt by its encoder and the answer by its decoder.

A decoder behind an encoder begins as `generate` of transformers begins it, and reads the answer moved by one
token, as it does when it is trained: `start`, then all but the last of the tokens that it is to put out.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qprobe.errors import ModelError
from qprobe.inputs.batch import ANSWER, PAD, Batch, tokenizer_of, vision_token_ids
from qprobe.loading.inventory import has_language_head
from qprobe.records import Sample


@dataclass(frozen=True)
class Decoder:
    """How the decoder begins. start: id ahead of all it puts out. forced: id that every answer is made to
    begin with, such as a language; None where the tokenizer decides.
    """

    start: int
    forced: int | None = None


@dataclass(frozen=True)
class Layout:
    """How a model reads samples.

    vision_token_ids: mark vision tokens in the text. decoder: None for a model that reads prompt and answer
    as one sequence.
    """

    vision_token_ids: tuple[int, ...] = ()
    decoder: Decoder | None = None


@dataclass(frozen=True)
class Answer:
    """What a decoder is to put out for a sample: `ids`, of which those from `begin` on are the answer's."""

    ids: tuple[int, ...]
    begin: int


def layout_of(model: Any) -> Layout:
    """How `model` (on any device, also meta) reads samples.

    Raises ModelError for a decoder whose configs do not say how it begins.
    """
    return Layout(vision_token_ids(model.config), _decoder_of(model) if is_encoder_decoder(model) else None)


def is_encoder_decoder(model: Any) -> bool:
    """True for a model whose encoder reads the prompt, and whose decoder answers."""
    takes = inspect.signature(model.forward).parameters
    reads_both = {"input_ids", "decoder_input_ids"} <= set(takes)
    is_asked = getattr(model.config, "is_encoder_decoder", False)
    return bool(is_asked) and reads_both and has_language_head(model) and model.can_generate()


def _decoder_of(model: Any) -> Decoder:
    """As `generate` (transformers 5.23, `_prepare_decoder_input_ids_for_generation`) finds its start."""
    configs = [getattr(model, "generation_config", None), model.config, model.config.get_text_config()]
    found = (getattr(c, key, None) for key in ("decoder_start_token_id", "bos_token_id") for c in configs)
    start = next((x for x in found if isinstance(x, int)), None)
    if start is None:
        raise ModelError(
            f"The configs of this {type(model).__name__} do not say what its decoder begins with. Write "
            "decoder_start_token_id into generation_config.json, as its model card says."
        )
    forced = getattr(configs[0], "forced_bos_token_id", None)
    return Decoder(start, forced if isinstance(forced, int) else None)


def answer_of(processor: Any, decoder: Decoder, sample: Sample) -> Answer:
    """The tokens of the sample's answer, with the end token where it ends, and what comes before them.

    What the tokenizer puts around every answer comes from it (BART's `<s>`, a language); without an answer
    there is nothing but that.
    """
    tokenizer = tokenizer_of(processor)
    around, ids = (tokenizer(text_target=x)["input_ids"] for x in ("", sample.answer or ""))
    ahead = _common(around, ids) if sample.answer else _ahead(tokenizer, around)
    behind = min(_common(around[::-1], ids[::-1]), len(around) - ahead)
    lead = ids[:ahead] if decoder.forced is None else [decoder.forced]
    if not sample.answer:
        return Answer(tuple(lead), len(lead))
    end = [tokenizer.eos_token_id] if sample.ends and tokenizer.eos_token_id is not None else []
    return Answer((*lead, *ids[ahead : len(ids) - behind], *end), len(lead))


def _ahead(tokenizer: Any, around: Sequence[int]) -> int:
    """How many of the tokens around an empty answer come before it."""
    end = tokenizer.eos_token_id
    return around.index(end) if end in around else len(around)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def with_answers(batch: Batch, processor: Any, decoder: Decoder) -> Batch:
    """`batch`, of prompts for the encoder, with what the decoder reads, padded on the right.

    Both sequences have unequal lengths, so that the rows of a layer tell which of them it reads.
    """
    pad_id = tokenizer_of(processor).pad_token_id
    answers = [answer_of(processor, decoder, s) for s in batch.samples]
    longest = max(1, *(len(x.ids) for x in answers))
    length = longest + (longest == batch.kinds.shape[1])
    ids = torch.full((batch.size, length), pad_id)
    kinds = torch.full(ids.shape, PAD, dtype=torch.uint8)
    for row, answer in enumerate(answers):
        read = [decoder.start, *answer.ids][: max(1, len(answer.ids))]
        ids[row, : len(read)] = torch.tensor(read)
        kinds[row, : len(read)] = ANSWER
    return Batch(
        batch.samples,
        {**batch.inputs, "decoder_input_ids": ids},
        batch.kinds,
        tuple((1 + x.begin, 1 + len(x.ids)) for x in answers),
        kinds,
    )
