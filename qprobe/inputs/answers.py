"""The reference's own greedy answers, for samples that bring none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qprobe.inputs.batch import tokenizer_of
from qprobe.inputs.decoder import Decoder
from qprobe.inputs.halving import Halving
from qprobe.inputs.processed import ProcessedSamples
from qprobe.inputs.running import failure_explained
from qprobe.options import Progress, no_progress
from qprobe.records import Sample

# Models whose decoder refuses the cache that transformers 5.23 hands it.
_WITHOUT_CACHE = ("ProphetNetForConditionalGeneration",)


@dataclass(frozen=True)
class Batching:
    """How samples run. size: at most so many at once; max_new_tokens: of an answer that is generated."""

    size: int
    max_new_tokens: int


def answered(
    model: Any,
    processed: ProcessedSamples,
    samples: Sequence[Sample],
    batching: Batching,
    progress: Progress = no_progress,
    halving: Halving | None = None,
) -> list[Sample]:
    """`samples` with the model's greedy answers in place of their own, in the same order.

    halving: of batches that memory does not suffice for.
    """
    limit, tried = batching.max_new_tokens, halving or Halving()
    done: dict[int, Sample] = {}
    index = {id(s): i for i, s in enumerate(samples)}
    for group in processed.batches(samples, batching.size):
        for sample, own in zip(group, answer_group(model, processed, group, limit, tried), strict=True):
            done[index[id(sample)]] = own
        progress("answers", len(done), len(samples))
    return [done[i] for i in range(len(samples))]


def answer_group(
    model: Any,
    processed: ProcessedSamples,
    group: Sequence[Sample],
    max_new_tokens: int,
    halving: Halving,
    device: torch.device | None = None,
) -> list[Sample]:
    """`answered` of one batch, as `ProcessedSamples.batches` cuts it; device: None for the weights'."""
    parts = halving.run(
        "answers", group, lambda part: _generate(model, processed, part, max_new_tokens, device)
    )
    found = [one for _, answers in parts for one in answers]
    return [replace(s, answer=text, ends=ends) for s, (text, ends) in zip(group, found, strict=True)]


def _generate(
    model: Any, processed: ProcessedSamples, group: Sequence[Sample], limit: int, device: torch.device | None
) -> list[tuple[str, bool]]:
    """(text, ended by itself) for each sample of one batch."""
    from transformers import GenerationConfig

    tokenizer = tokenizer_of(processed.processor)
    device = device or next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in processed.prompts(group).items()}
    stop, decoder = _stop_ids(model, tokenizer), processed.decoder
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=limit,
        eos_token_id=stop or None,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=None if decoder is None else decoder.start,
        use_cache=False if type(model).__name__ in _WITHOUT_CACHE else None,
    )
    with failure_explained(model), torch.inference_mode():
        output = model.generate(**inputs, generation_config=config)
    prompts = inputs.get("input_ids" if decoder is None else "decoder_input_ids")
    rows = output[:, 1 if prompts is None else prompts.shape[1] :].tolist()
    forced = getattr(model.generation_config, "forced_eos_token_id", None)
    results = []
    for row in rows:
        end = next((i for i, token in enumerate(row) if token in stop), None)
        is_forced = forced is not None and end == limit - 1  # an end that generation puts where it stops
        text = _text(tokenizer, row[:end], decoder)
        results.append((text, end is not None and not is_forced))
    return results


def _text(tokenizer: Any, ids: list[int], decoder: Decoder | None) -> str:
    """The answer in `ids`. Behind an encoder special tokens belong to it, such as Florence-2's places on the
    image or T5's sentinels, but for those around it.
    """
    if decoder is None:
        return tokenizer.decode(ids, skip_special_tokens=True)
    around = {decoder.start, decoder.forced, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return tokenizer.decode([x for x in ids if x not in around], skip_special_tokens=False)


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer, from the model's generation config, else the tokenizer."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
