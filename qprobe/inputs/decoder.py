"""How a model reads a sample: as one sequence, or the prompt by its encoder and the answer by its decoder.

A decoder behind an encoder begins as `generate` of transformers begins it, and reads the answer moved by one
token, as it does when it is trained: `start`, then all but the last of the tokens that it is to put out. An
encoder may read an image alone; the prompt is then drawn onto the image, or its decoder begins with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from qprobe.errors import ModelError
from qprobe.inputs.batch import ANSWER, PAD, TEXT, Batch, prompt_text, tokenizer_of, vision_token_ids
from qprobe.loading.inventory import has_language_head
from qprobe.records import Sample


@dataclass(frozen=True)
class Decoder:
    """How the decoder begins. start: id ahead of all it puts out. forced: id that every answer is made to
    begin with, such as a language; None where the tokenizer decides.

    prompt: what reads it: the encoder, with the image if there is one; the encoder as a part of the image,
    onto which the processor draws it (Pix2Struct for questions); or the decoder ahead of the answer, behind
    an encoder that reads the image alone (Donut, TrOCR). leads: a prompt in the decoder takes the place of
    `start`.
    """

    start: int
    forced: int | None = None
    prompt: Literal["encoder", "image", "decoder"] = "encoder"
    leads: bool = False

    @property
    def sees_alone(self) -> bool:
        """True if the encoder reads one image and no text."""
        return self.prompt != "encoder"


@dataclass(frozen=True)
class Layout:
    """How a model reads samples.

    vision_token_ids: mark vision tokens in the text. decoder: None for a model that reads prompt and answer
    as one sequence. positions: how many tokens a text may have; None where the config names no number.
    """

    vision_token_ids: tuple[int, ...] = ()
    decoder: Decoder | None = None
    positions: int | None = None

    def excess(self, tokens: int) -> str | None:
        """Why a text of so many tokens is not read; None if it fits."""
        if self.positions is None or tokens <= self.positions:
            return None
        return f"it has {tokens:,} tokens, and the model has positions for {self.positions:,}"


@dataclass(frozen=True)
class Answer:
    """What a decoder is to put out for a sample behind `start`: `ids`, of which those from `begin` on are the
    answer's.
    """

    start: int
    ids: tuple[int, ...]
    begin: int


def layout_of(model: Any) -> Layout:
    """How `model` (on any device, also meta) reads samples.

    Raises ModelError for a decoder whose configs do not say how it begins.
    """
    decoder = _decoder_of(model) if is_encoder_decoder(model) else None
    return Layout(vision_token_ids(model.config), decoder, _positions(model))


def _positions(model: Any) -> int | None:
    """How many tokens `model` was made for. RoBERTa and its kin begin behind the id of the padding."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    learned = (m for name, m in model.named_modules() if name.endswith(".position_embeddings"))
    padding = next((m.padding_idx for m in learned if getattr(m, "padding_idx", None) is not None), None)
    return most if padding is None else most - padding - 1


def is_encoder_decoder(model: Any) -> bool:
    """True for a model whose encoder reads prompt or image, and whose decoder answers."""
    takes = inspect.signature(model.forward).parameters
    reads_both = "decoder_input_ids" in takes and ("input_ids" in takes or _IMAGES & set(takes))
    is_asked = getattr(model.config, "is_encoder_decoder", False)
    return bool(is_asked and reads_both) and has_language_head(model) and model.can_generate()


_IMAGES = {"pixel_values", "flattened_patches"}  # what an encoder of images alone reads


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
    decoder = Decoder(start, forced if isinstance(forced, int) else None)
    if "input_ids" in inspect.signature(model.forward).parameters:
        return decoder
    # As `generate` does: a prompt takes the place of the start in Donut alone.
    is_donut = "donut" in getattr(getattr(model.config, "encoder", None), "model_type", "")
    prompt = "image" if getattr(model.config, "is_vqa", False) else "decoder"
    return replace(decoder, prompt=prompt, leads=is_donut)


def read_ahead(processor: Any, decoder: Decoder, sample: Sample) -> tuple[int, ...]:
    """The ids that the decoder reads ahead of the answer and what the tokenizer puts before that."""
    if decoder.prompt != "decoder":
        return (decoder.start,)
    tokenizer = tokenizer_of(processor)
    prompt = prompt_text(processor, sample)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    is_led = ids and (decoder.leads or ids[0] == decoder.start)
    return tuple(ids if is_led else [decoder.start, *ids])


def answer_of(processor: Any, decoder: Decoder, sample: Sample) -> Answer:
    """The tokens of the sample's answer, with the end token where it ends, and what comes before them.

    What the tokenizer puts around every answer comes from it (BART's `<s>`, a language); without an answer
    there is nothing but that.
    """
    tokenizer = tokenizer_of(processor)
    around, ids = (tokenizer(text_target=x)["input_ids"] for x in ("", sample.answer or ""))
    ahead = _common(around, ids) if sample.answer else _ahead(tokenizer, around)
    behind = min(_common(around[::-1], ids[::-1]), len(around) - ahead)
    start, *prompt = read_ahead(processor, decoder, sample)
    # An answer goes on from a prompt, without what the tokenizer puts ahead of a text by itself.
    lead = prompt or (ids[:ahead] if decoder.forced is None else [decoder.forced])
    if not sample.answer:
        return Answer(start, tuple(lead), len(lead))
    end = [tokenizer.eos_token_id] if sample.ends and tokenizer.eos_token_id is not None else []
    return Answer(start, (*lead, *ids[ahead : len(ids) - behind], *end), len(lead))


def _ahead(tokenizer: Any, around: Sequence[int]) -> int:
    """How many of the tokens around an empty answer come before it."""
    end = tokenizer.eos_token_id
    return around.index(end) if end in around else len(around)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def with_answers(batch: Batch, processor: Any, decoder: Decoder) -> Batch:
    """`batch`, of what the encoder reads, with what the decoder reads, padded on the right.

    Both sequences have unequal lengths, so that the rows of a layer tell which of them it reads.
    """
    pad_id = tokenizer_of(processor).pad_token_id
    answers = [answer_of(processor, decoder, s) for s in batch.samples]
    longest = max(1, *(len(x.ids) for x in answers))
    length = longest + (longest == batch.kinds.shape[1])
    ids = torch.full((batch.size, length), pad_id)
    kinds = torch.full(ids.shape, PAD, dtype=torch.uint8)
    for row, answer in enumerate(answers):
        read = [answer.start, *answer.ids][: max(1, len(answer.ids))]
        ids[row, : len(read)] = torch.tensor(read)
        kinds[row, : len(read)] = ANSWER
        if decoder.prompt == "decoder":
            kinds[row, : answer.begin] = TEXT
    return Batch(
        batch.samples,
        {**batch.inputs, "decoder_input_ids": ids},
        batch.kinds,
        tuple((1 + x.begin, 1 + len(x.ids)) for x in answers),
        kinds,
    )
