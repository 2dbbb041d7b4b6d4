"""The reference's own greedy answers, for samples that bring none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qprobe.inputs.batch import batches, process, prompt_text, tokenizer_of
from qprobe.options import Progress, no_progress
from qprobe.records import Sample


def greedy_answers(
    model: Any, processor: Any, samples: Sequence[Sample], max_new_tokens: int, batch_size: int
) -> list[str]:
    """The model's greedy answer to each sample, without special tokens, at most `max_new_tokens` long."""
    return [s.answer or "" for s in answered(model, processor, samples, max_new_tokens, batch_size)]


def answered(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress = no_progress,
) -> list[Sample]:
    """`samples` with the model's greedy answers in place of their own, in the same order."""
    done: dict[int, Sample] = {}
    index = {id(s): i for i, s in enumerate(samples)}
    for group in batches(processor, samples, batch_size):
        for sample, own in zip(group, answer_group(model, processor, group, max_new_tokens), strict=True):
            done[index[id(sample)]] = own
        progress("answers", len(done), len(samples))
    return [done[i] for i in range(len(samples))]


def answer_group(
    model: Any,
    processor: Any,
    group: Sequence[Sample],
    max_new_tokens: int,
    device: torch.device | None = None,
) -> list[Sample]:
    """`answered` of one batch, as `qprobe.inputs.batch.batches` cuts it; device: None for the weights'."""
    found = _generate(model, processor, group, max_new_tokens, device)
    return [replace(s, answer=text, ends=ends) for s, (text, ends) in zip(group, found, strict=True)]


def _generate(
    model: Any, processor: Any, group: Sequence[Sample], limit: int, device: torch.device | None
) -> list[tuple[str, bool]]:
    """(text, ended by itself) for each sample of one batch."""
    from transformers import GenerationConfig

    tokenizer = tokenizer_of(processor)
    device = device or next(model.parameters()).device
    texts = [prompt_text(processor, s) for s in group]
    raw = process(processor, group, texts, "left")
    inputs = {
        k: v.to(device, model.dtype) if v.is_floating_point() else v.to(device)
        for k, v in raw.items()
        if isinstance(v, Tensor)
    }
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
