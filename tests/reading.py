"""Short ways to what a processor makes of samples, and to a model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qprobe.inputs import answers
from qprobe.inputs.batch import Batch
from qprobe.inputs.decoder import Layout, layout_of
from qprobe.inputs.processed import ProcessedSamples
from qprobe.records import Sample


def encode(
    processor: Any, samples: Sequence[Sample], dtype: torch.dtype, vision: tuple[int, ...] = ()
) -> Batch:
    return ProcessedSamples(processor, dtype, Layout(vision)).batch(samples)


def batches(processor: Any, samples: Sequence[Sample], size: int) -> list[tuple[Sample, ...]]:
    return ProcessedSamples(processor, torch.bfloat16).batches(samples, size)


def answered(model: Any, processor: Any, samples: Sequence[Sample], limit: int, size: int) -> list[Sample]:
    return answers.answered(
        model,
        ProcessedSamples(processor, model.dtype, layout_of(model)),
        samples,
        answers.Batching(size, limit),
    )


def greedy_answers(model: Any, processor: Any, samples: Sequence[Sample], limit: int, size: int) -> list[str]:
    return [s.answer or "" for s in answered(model, processor, samples, limit, size)]
