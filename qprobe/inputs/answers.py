"""The reference's own greedy answers, for samples that bring none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qprobe.inputs.batch import tokenizer_of
from qprobe.inputs.processed import ProcessedSamples
from qprobe.options import Progress, no_progress
from qprobe.records import Sample


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
) -> list[Sample]:
    """`samples` with the model's greedy answers in place of their own, in the same order."""
    done: dict[int, Sample] = {}
    index = {id(s): i for i, s in enumerate(samples)}
    limit = batching.max_new_tokens
    for group in processed.batches(samples, batching.size):
        for sample, own in zip(group, answer_group(model, processed, group, limit), strict=True):
            done[index[id(sample)]] = own
        progress("answers", len(done), len(samples))
    return [done[i] for i in range(len(samples))]


def answer_group(
    model: Any,
    processed: ProcessedSamples,
    group: Sequence[Sample],
    max_new_tokens: int,
    device: torch.device | None = None,
) -> list[Sample]:
    """`answered` of one batch, as `ProcessedSamples.batches` cuts it; device: None for the weights'."""
    found = _generate(model, processed, group, max_new_tokens, device)
    return [replace(s, answer=text, ends=ends) for s, (text, ends) in zip(group, found, strict=True)]


def _generate(
    model: Any, processed: ProcessedSamples, group: Sequence[Sample], limit: int, device: torch.device | None
) -> list[tuple[str, bool]]:
    """(text, ended by itself) for each sample of one batch."""
    from transformers import GenerationConfig

    tokenizer = tokenizer_of(processed.processor)
    device = device or next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in processed.prompts(group).items()}
    stop = _stop_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=stop or None, pad_token_id=tokenizer.pad_token_id
    )
    with torch.inference_mode():
        output = model.generate(**inputs, generation_config=config)
    results = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in stop), None)
        results.append((tokenizer.decode(row[:end], skip_special_tokens=True), end is not None))
    return results


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer, from the model's generation config, else the tokenizer."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
