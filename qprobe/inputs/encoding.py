"""Conversations -> model inputs with labels on the tokens of the answers, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qprobe.data.conversation import Conversation
from qprobe.data.reading import read_conversations
from qprobe.data.reasons import Refused
from qprobe.data.rendering import Template
from qprobe.data.turns import held, learning
from qprobe.errors import SampleError
from qprobe.inputs.batch import (
    UnreadableError,
    full_text,
    has_template,
    mark_in,
    process,
    prompt_text,
    tokenizer_of,
    video_problem,
)
from qprobe.inputs.decoder import Decoder, Layout, answer_of, layout_of
from qprobe.inputs.joining import Inputs, joined
from qprobe.inputs.processed import ProcessedSamples
from qprobe.records import Sample

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation; answers: (start, end) of each answer in it, its end token included."""

    text: str
    answers: tuple[tuple[int, int], ...]


def render(processor: Any, conversation: Conversation) -> Rendered:
    """The conversation in the words of the processor's chat template; answers: those that are learned.

    Without a template the text is the plain one that a scan reads. Raises Refused if the template does not
    keep texts, or rewrites a turn that is learned once others follow it, for more than the last answer of
    plain text, and for a video that the processor does not take.
    """
    problem = video_problem(processor, conversation.seen)
    if problem is not None:
        raise Refused(problem)
    if not has_template(processor):
        return _plain(processor, conversation)
    template, turns = Template(processor), conversation.turns
    way, full = template.fitting(turns, False)
    answers = []
    for place, turn in enumerate(turns):
        if turn.role != "assistant" or not turn.learned:
            continue
        before = template.written(turns[:place], way, True)
        so_far = template.written(turns[: place + 1], way, False)
        if not full.startswith(so_far):
            raise Refused("the model's chat template rewrites earlier turns, so they cannot be learned")
        # Where the prompt for an answer is written otherwise than the answer's own head, look for the text.
        opened = so_far.startswith(before)
        text = turn.parts[0]
        assert isinstance(text, str), "only the user shows images"
        start = (
            len(before)
            if opened
            else so_far.find(text.strip(), len(template.written(turns[:place], way, False)))
        )
        if start < 0 or text.strip() not in so_far[start:]:
            raise Refused(f"the model's chat template leaves out the answer of turn {place + 1}")
        answers.append((start, len(so_far.rstrip())))
    return Rendered(full, tuple(answers))


def _plain(processor: Any, conversation: Conversation) -> Rendered:
    """`render` without a template: an answer ends where its row does, as in a scan."""
    *before, last = conversation.turns
    if last.role != "assistant" or any(x.role == "assistant" and x.learned for x in before):
        raise Refused("without a chat template only the last answer of a line can be learned")
    sample = Sample(conversation.name, tuple(before), last.text)
    text = full_text(processor, sample)
    return Rendered(text, ((len(prompt_text(processor, sample)), len(text)),))


def rows_to_learn(
    processor: Any, conversation: Conversation, decoder: Decoder | None = None
) -> tuple[Conversation, ...]:
    """The conversation, or one up to each answer that is learned, where the template rewrites earlier turns
    or there is none, and where a `decoder` learns one answer at a time.

    Raises Refused as `render` does.
    """
    places = [i for i, x in enumerate(conversation.turns) if x.role == "assistant" and x.learned]
    if decoder is not None:
        return tuple(_up_to(conversation, place) for place in places)
    try:
        render(processor, conversation)
        return (conversation,)
    except Refused:
        if places == [len(conversation.turns) - 1]:
            raise
    rows = tuple(_up_to(conversation, place) for place in places)
    for row in rows:
        render(processor, row)
    return rows


def _up_to(conversation: Conversation, place: int) -> Conversation:
    """The turns up to the answer at `place`, of which it alone is learned."""
    turns = conversation.turns[: place + 1]
    return replace(
        conversation,
        turns=tuple(
            replace(x, learned=i == place) if x.role == "assistant" else x for i, x in enumerate(turns)
        ),
    )


def encode_conversations(
    processor: Any,
    conversations: Sequence[Conversation],
    dtype: torch.dtype,
    decoder: Decoder | None = None,
) -> dict[str, Tensor]:
    """Model inputs of a batch on the CPU, padded on the right, with `labels` (B, T): IGNORED but at answers.

    decoder: of an encoder-decoder; the labels are then all that it is to put out but for a prompt that it
    reads itself, as transformers' own training scripts have them. Floating tensors are in `dtype`. Raises
    SampleError for what the processor cannot read or tell apart.
    """
    if decoder is not None:
        return _encoded_apart(processor, conversations, dtype, decoder)
    rendered = [render(processor, x) for x in conversations]
    rows = [_encoded(processor, x, one.text, dtype) for x, one in zip(conversations, rendered, strict=True)]
    inputs = joined(rows, "right", tokenizer_of(processor).pad_token_id)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    for row, (length, one) in enumerate(zip(lengths, rendered, strict=True)):
        own = ids[row, :length].tolist()
        for place in _answer_tokens(tokenizer_of(processor), one, own):
            labels[row, place] = ids[row, place]
    return {**inputs, "labels": labels}


def _encoded_apart(
    processor: Any, conversations: Sequence[Conversation], dtype: torch.dtype, decoder: Decoder
) -> dict[str, Tensor]:
    """`encode_conversations` of prompts for an encoder and, for its decoder, their last answers."""
    samples = [_sample(x) for x in conversations]
    batch = ProcessedSamples(processor, dtype, Layout(decoder=decoder)).batch(samples)
    labels = torch.full_like(batch.inputs["decoder_input_ids"], IGNORED)
    for row, sample in enumerate(samples):
        answer = answer_of(processor, decoder, sample)
        if len(answer.ids) == answer.begin:
            raise SampleError("no token of it belongs to an answer")
        learned = answer.begin if decoder.prompt == "decoder" else 0
        labels[row, learned : len(answer.ids)] = torch.tensor(answer.ids[learned:])
    return {**batch.inputs, "labels": labels}


def _sample(conversation: Conversation) -> Sample:
    """The conversation up to its last answer, and that."""
    *before, last = held(conversation.turns)
    return Sample(conversation.name, tuple(before), last.text)


def _encoded(processor: Any, conversation: Conversation, text: str, dtype: torch.dtype) -> Inputs:
    """The inputs of one conversation by itself."""
    made = process(processor, [_sample(conversation)], [text], "right")
    return {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in made.items()
        if isinstance(value, Tensor)
    }


def answer_collator(
    processor: Any, dtype: torch.dtype = torch.bfloat16, model: Any = None
) -> Callable[[list[Any]], dict[str, Tensor]]:
    """A `data_collator` for TRL's SFTTrainer that learns the answers only; for any processor.

    TRL's own puts labels on image tokens too, which Llama 3.2 Vision has no logits for. Rows without images
    need `dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False` in SFTConfig. Rows as of
    `read_conversations`, or lists of turns as Unsloth's takes them; dtype: of the pixels. model: the one that
    learns, needed for an encoder-decoder alone, whose decoder learns the last answer of each row. Raises
    SampleError for a row that cannot be trained on.
    """
    decoder = None if model is None else layout_of(model).decoder
    return lambda rows: encode_conversations(processor, _conversations(rows), dtype, decoder)


def _conversations(rows: list[Any]) -> list[Conversation]:
    if any(isinstance(x, Mapping) and "input_ids" in x for x in rows):
        raise SampleError(
            "The rows are tokens already, so answers cannot be told from questions: SFTTrainer tokenizes "
            "rows without images first. Pass dataset_kwargs={'skip_prepare_dataset': True} and "
            "remove_unused_columns=False to SFTConfig."
        )
    found = read_conversations([{"messages": x} if isinstance(x, list) else x for x in rows])
    try:
        if found.skipped:
            raise Refused(found.skipped[0].why)
        return [learning(x, "each") for x in found.good]
    except Refused as reason:
        raise SampleError(
            f"A row of the data set cannot be trained on: {reason}. Fix it or drop it."
        ) from None


def _answer_tokens(tokenizer: Any, rendered: Rendered, ids: list[int]) -> list[int]:
    """Places in `ids`, the processor's tokens of the text, that belong to answers.

    The processor writes one mark of an image as many tokens. Before and behind them its tokens are those of
    the plain text, whose characters the tokenizer can tell.
    """
    bos = tokenizer.bos_token
    plain = tokenizer(
        rendered.text,
        return_offsets_mapping=True,
        add_special_tokens=not (bos and rendered.text.startswith(bos)),
    )
    words: list[int] = plain["input_ids"]
    ahead = _common(words, ids)
    behind = min(_common(words[::-1], ids[::-1]), len(words) - ahead, len(ids) - ahead)
    places = []
    for place, (start, end) in enumerate(plain["offset_mapping"]):
        if start == end or not any(a <= start and end <= b for a, b in rendered.answers):
            continue
        if ahead <= place < len(words) - behind:
            raise SampleError("its answers cannot be told from its image after tokenization")
        places.append(place if place < ahead else place + len(ids) - len(words))
    if not places:
        raise SampleError("no token of it belongs to an answer")
    return places


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many items both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def encoding_problem(
    processor: Any,
    conversation: Conversation,
    dtype: torch.dtype,
    max_length: int,
    layout: Layout = Layout(),  # noqa: B008  # frozen
) -> str | None:
    """Why the conversation cannot be trained on once it is tokens; None if it can."""
    if conversation.seen and tokenizer_of(processor) is processor:
        return "it has an image, but the model reads text only"
    mark = mark_in(processor, [x.text for x in conversation.turns])
    if mark is not None:
        return mark
    try:
        inputs = encode_conversations(processor, [conversation], dtype, layout.decoder)
    except UnreadableError as error:
        return error.why
    except (SampleError, Refused) as error:
        return str(error)
    length = max(inputs[x].shape[1] for x in ("input_ids", "labels") if x in inputs)
    if length > max_length:
        return f"it has {length:,} tokens, more than --max-length {max_length:,}"
    return layout.excess(length)
