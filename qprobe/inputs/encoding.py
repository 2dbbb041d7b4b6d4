"""Conversations -> model inputs with labels on the tokens of the answers, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qprobe.data.conversations import Conversation, Turn, conversation_of
from qprobe.errors import ModelError, SampleError
from qprobe.inputs.batch import process, tokenizer_of
from qprobe.records import Sample, asked

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation; answers: (start, end) of each answer in it, its end token included."""

    text: str
    answers: tuple[tuple[int, int], ...]


def render(processor: Any, conversation: Conversation) -> Rendered:
    """The conversation in the words of the processor's chat template.

    Raises ModelError if there is no template, SampleError if the template does not keep earlier turns as
    they were or leaves an answer out.
    """
    if not getattr(processor, "chat_template", None):
        raise ModelError(
            "The model's processor has no chat template, so conversations cannot be written as it reads them."
            " Take the instruction-tuned model, or put a chat_template.jinja into its folder."
        )
    error: SampleError | None = None
    # Templates of some processors want lists of parts from everybody, others plain text from the assistant.
    for in_parts in ({"system", "user", "assistant"}, {"user"}):
        try:
            return _rendered(processor, conversation, in_parts)
        except SampleError as wrong:
            error = error or wrong
    assert error is not None
    raise error


def _rendered(processor: Any, conversation: Conversation, in_parts: set[str]) -> Rendered:
    is_plain = tokenizer_of(processor) is processor
    messages = [
        {"role": x.role, "content": _parts(x) if x.role in in_parts and not is_plain else x.text}
        for x in conversation.turns
    ]

    def written(count: int, prompt: bool) -> str:
        try:
            return processor.apply_chat_template(
                messages[:count], add_generation_prompt=prompt, tokenize=False
            )
        except Exception as error:  # templates raise what they like: jinja2's errors, TypeError, KeyError
            raise SampleError(f"the model's chat template does not take it ({error})") from error

    full, answers = written(len(messages), False), []
    for place, turn in enumerate(conversation.turns):
        if turn.role != "assistant":
            continue
        before, so_far = written(place, True), written(place + 1, False)
        if not full.startswith(so_far):
            raise SampleError("the model's chat template rewrites earlier turns, so they cannot be learned")
        # Where the prompt for an answer is written otherwise than the answer's own head, look for the text.
        opened = len(before) if so_far.startswith(before) else len(written(place, False))
        start = opened if so_far.startswith(before) else so_far.find(turn.text, opened)
        if start < 0 or turn.text not in so_far[start:]:
            raise SampleError(f"the model's chat template leaves out the answer of turn {place + 1}")
        answers.append((start, len(so_far.rstrip())))
    return Rendered(full, tuple(answers))


def _parts(turn: Turn) -> list[dict[str, str]]:
    text = [{"type": "text", "text": turn.text}] if turn.text else []
    if turn.image is None:
        return text
    return [{"type": "image"}, *text] if turn.image == "before" else [*text, {"type": "image"}]


def encode_conversations(
    processor: Any, conversations: Sequence[Conversation], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Model inputs of a batch on the CPU, padded on the right, with `labels` (B, T): IGNORED but at answers.

    Floating tensors are in `dtype`. Raises SampleError for what the processor cannot read or tell apart.
    """
    with_image = sum(x.image is not None for x in conversations)
    if 0 < with_image < len(conversations):
        raise SampleError("a batch mixes lines with and without an image; pass --batch-size 1")
    rendered = [render(processor, x) for x in conversations]
    samples = [Sample(f"line {x.line}", asked("", _image_bytes(x))) for x in conversations]
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in process(processor, samples, [x.text for x in rendered], "right").items()
        if isinstance(value, Tensor)
    }
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    for row, (length, one) in enumerate(zip(lengths, rendered, strict=True)):
        own = ids[row, :length].tolist()
        for place in _answer_tokens(tokenizer_of(processor), one, own):
            labels[row, place] = ids[row, place]
    return {**inputs, "labels": labels}


def _image_bytes(conversation: Conversation) -> bytes | None:
    image = conversation.image
    return image.read_bytes() if isinstance(image, Path) else image


def answer_collator(
    processor: Any, dtype: torch.dtype = torch.bfloat16
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A `data_collator` for TRL's SFTTrainer that learns the answers only; for any processor with a template.

    TRL's own puts labels on image tokens too, which Llama 3.2 Vision has no logits for. Rows as of
    `conversation_of`; dtype: of the pixels. Raises SampleError for a row that cannot be trained on.
    """
    return lambda rows: encode_conversations(processor, [conversation_of(x) for x in rows], dtype)


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
    processor: Any, conversation: Conversation, dtype: torch.dtype, max_length: int
) -> str | None:
    """Why the conversation cannot be trained on once it is tokens; None if it can."""
    if conversation.image is not None and tokenizer_of(processor) is processor:
        return "it has an image, but the model reads text only"
    token = getattr(processor, "image_token", None)
    if token and any(token in turn.text for turn in conversation.turns):
        return f"its text contains {token}, which stands for an image in this model"
    control = _control_token(processor, conversation)
    if control is not None:
        return f"its text contains {control}, which the model reads as a mark of its own, not as text"
    try:
        inputs = encode_conversations(processor, [conversation], dtype)
    except SampleError as error:
        return str(error)
    except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"the model's processor cannot read it ({first})"
    length = inputs["input_ids"].shape[1]
    if length > max_length:
        return f"it has {length:,} tokens, more than --max-length {max_length:,}"
    return None


def _control_token(processor: Any, conversation: Conversation) -> str | None:
    """A special token that a turn's text spells out: it would end an answer or open a turn in its middle."""
    tokens = tokenizer_of(processor).all_special_tokens
    # Of one character are a few models' padding tokens, such as CLIP's "!".
    return next(
        (x for x in tokens if len(x) > 1 and any(x in turn.text for turn in conversation.turns)), None
    )
