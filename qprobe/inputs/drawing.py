"""Texts that a model draws itself: token by token from its own distribution, at temperature 1.

They show what a model has seen of the world at large, where samples show one kind of it. Every second text
goes on from the token that texts begin with; the others have a token at random next, which leads to texts
that the first token alone seldom leads to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qprobe.errors import ModelError
from qprobe.inputs.batch import ANSWER, TEXT, Batch, tokenizer_of, vision_token_ids
from qprobe.inputs.decoder import is_encoder_decoder
from qprobe.inputs.running import failure_explained
from qprobe.loading.inventory import has_language_head
from qprobe.records import Sample, asked

TOKENS = 128  # of a text, as many as the passages had that drawn texts were tried beside

Texts = tuple[tuple[int, ...], ...]
"""The ids of the tokens of each text."""


def refuse_undrawable(model: Any) -> None:
    """Raises ModelError for a model, maybe without its weights, that writes no text from nothing."""
    can_write = has_language_head(model) and model.can_generate() and not is_encoder_decoder(model)
    if not can_write or model.main_input_name != "input_ids":  # such as BLIP-2, which wants an image
        raise ModelError(
            f"{type(model).__name__} does not write texts token by token from nothing, so it draws none for "
            "--drawn-texts. Leave it out."
        )


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens a text is made of.

    begin: the id that a text is drawn from; None where there is none. is_read: the tokenizer puts it before
    every text. drawable: ids of the others, in order; marks of the model's own (special tokens, places of
    images) are none of them.
    """

    begin: int | None
    is_read: bool
    drawable: Tensor


def vocabulary_of(model: Any, processor: Any) -> Vocabulary:
    """The vocabulary of texts that `model` draws."""
    tokenizer, config = tokenizer_of(processor), model.config.get_text_config()
    added = [x for x, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = {*tokenizer.all_special_ids, *added}
    named = (tokenizer.bos_token_id, getattr(config, "bos_token_id", None), tokenizer.eos_token_id)
    # A config that says nothing has an id of its class, which may be that of any word.
    begin = next((x for x in named if isinstance(x, int) and x in special), None)
    words = min(len(tokenizer), _head_rows(model))
    marks = {*special, *vision_token_ids(model.config)}
    drawable = torch.tensor([x for x in range(words) if x not in marks])
    return Vocabulary(begin, tokenizer("a")["input_ids"][:1] == [begin], drawable)


def draw_texts(model: Any, processor: Any, count: int, seed: int, device: torch.device) -> Texts:
    """`count` texts of `TOKENS` tokens each, or as many as the model can read.

    The same model, seed and device draw the same texts. Sampled as the largest of the logits, in float32,
    with Gumbel noise on them, so that no setting of the model's own generation takes part.
    """
    from transformers import GenerationConfig

    words = vocabulary_of(model, processor)
    generator = torch.Generator().manual_seed(seed)
    first = words.drawable[torch.randint(len(words.drawable), (count,), generator=generator)]
    if words.begin is None:
        prompts, forced = first[:, None], torch.full((count,), -1)
    else:
        prompts = torch.full((count, 1), words.begin)
        forced = torch.where(torch.arange(count) % 2 == 1, first, -1)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(TOKENS, longest - 1) if isinstance(longest, int) and longest > 1 else TOKENS
    config = GenerationConfig(do_sample=False, max_new_tokens=length, pad_token_id=0)
    noisy = _Noisy(words.drawable.to(device), forced.to(device), seed)
    prompts = prompts.to(device)
    explained = failure_explained(model, "write a text from nothing", "Leave out --drawn-texts.")
    with explained, torch.inference_mode(), _without_own_settings(model):
        written = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=config,
            logits_processor=[noisy],
        )
    begin = 0 if words.is_read or words.begin is None else 1
    return tuple(tuple(row) for row in written[:, begin : begin + length].tolist())


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """While open, `model` generates as no settings of its own say: it bars no token, and ends nowhere."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(use_cache=own.use_cache)
    try:
        yield
    finally:
        model.generation_config = own


def _head_rows(model: Any) -> int:
    return model.get_output_embeddings().weight.shape[0]


class _Noisy:
    """A logits processor: the largest of what it gives is a token drawn from the softmax of the logits.

    drawable: ids, none but which are drawn. forced: (texts,) of each its first token, -1 where it is drawn.
    """

    def __init__(self, drawable: Tensor, forced: Tensor, seed: int) -> None:
        self.drawable, self.forced = drawable, forced
        self.generator = torch.Generator(drawable.device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores[:, self.drawable].float()
        noise = torch.empty_like(logits).exponential_(generator=self.generator).clamp_min(1e-38)
        found = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        found[:, self.drawable] = logits - noise.log()
        if input_ids.shape[1] == 1:
            rows = (self.forced >= 0).nonzero().flatten()
            found[rows, self.forced[rows]] = torch.inf
        return found


def text_batches(processor: Any, texts: Texts, size: int, weight: float) -> list[Batch]:
    """`texts`, all of one length, in batches of `size`, on the CPU: each token but the first is an answer's.

    weight: as of `Batch`.
    """
    return [_batch(processor, texts[i : i + size], weight) for i in range(0, len(texts), size)]


def _batch(processor: Any, texts: Texts, weight: float) -> Batch:
    ids = torch.tensor(texts)
    kinds = torch.full(ids.shape, ANSWER, dtype=torch.uint8)
    kinds[:, 0] = TEXT
    tokenizer = tokenizer_of(processor)
    samples = tuple(Sample("drawn", asked(""), tokenizer.decode(row)) for row in texts)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(samples, inputs, kinds, ((1, ids.shape[1]),) * len(texts), weight=weight)
