"""What a user can ask of a command: frozen, torch-free, the same from Python and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_BUDGET = "+10%"
MEASURES = ("weight", "activation", "propagated", "sensitivity")
"""What `ScanOptions.measures` may name; what runs samples measures activation as well, and all do weight."""
FOR = ("vllm",)
"""Tools whose fused groups a skip-list can be asked to keep whole."""
Dtype = Literal["bfloat16", "float16"]
Base = Literal["16-bit", "nf4", "dynamic"]
BadData = Literal["refuse", "skip"]
Optimizer = Literal["adamw_8bit", "adamw_torch"]
Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total) whenever work moves on."""


def no_progress(stage: str, done: int, total: int) -> None:
    """The silent `Progress`."""


@dataclass(frozen=True)
class ScanOptions:
    """Everything `scan` can be asked.

    model: catalogue alias, hub id or local folder.
    images: folder of images; data: JSONL file of samples; at most one of them, neither for the built-in ones.
    prompt: asked of every image of `images`; samples: how many to measure; None for a sensible number.
    format: "nf4", or "nf4-calibrated" for codes that are chosen on the samples, at the same bytes.
    max_memory: the most that the scan may hold on its device, on a CPU in its process ("22GiB"); weights that
        do not fit wait on the host and are copied when a layer runs, for the same results. None for no limit.
    budget: what the skip-list may cost in bytes: "+10%" of standard 4-bit, "+690MiB", or a total "7.3GiB";
        None for DEFAULT_BUDGET. max_kl: ask the other way round, for the fewest bytes with a KL of at most
        this; at most one of the two.
    out: the run folder; None for runs/MODEL.
    device: "cpu", "cuda", "cuda:1", "auto" for all GPUs; None for the best one there is, or all GPUs where
        the model is too large for one. dtype: of the 16-bit reference.
    by: the score column that chooses; None for the best one measured.
    measures: which of `MEASURES` to take; None for all that apply. ("weight",) alone reads the checkpoint
        tensor by tensor and never loads the model. nodes: of the path attribution.
    for_tool: one of FOR, whose fused groups every list keeps whole; None for lists that need not.
    ablate: measure the KL of single layers as well, two forward passes each: "all", the number of layers to
        take from the head of the sensitivity ranking, or names with commas between them.
    """

    model: str
    images: Path | None = None
    data: Path | None = None
    prompt: str | None = None
    samples: int | None = None
    format: str = "nf4"
    budget: str | None = None
    max_kl: float | None = None
    out: Path | None = None
    device: str | None = None
    dtype: Dtype = "bfloat16"
    seed: int = 0
    batch_size: int = 4
    max_new_tokens: int = 64
    by: str | None = None
    for_tool: str | None = None
    measures: tuple[str, ...] | None = None
    nodes: int = 2
    ablate: str | None = None
    max_memory: str | None = None


@dataclass(frozen=True)
class CompareOptions:
    """Everything `compare` can be asked.

    manifest: the skiplist.json of a scan.
    model: where the 16-bit weights are; None for the id that the manifest names.
    images, data, prompt, samples, seed: as in `ScanOptions`; built-in samples are other ones than a scan's.
    dtype: of everything in 16-bit; None for the manifest's compute_dtype.
    """

    manifest: Path
    model: str | None = None
    images: Path | None = None
    data: Path | None = None
    prompt: str | None = None
    samples: int | None = None
    device: str | None = None
    dtype: Dtype | None = None
    seed: int = 0
    batch_size: int = 4
    max_new_tokens: int = 64


@dataclass(frozen=True)
class FinetuneOptions:
    """Everything `finetune` can be asked.

    manifest: the skiplist.json of a scan. data: JSONL file of conversations. out: folder of the adapter.
    base: what the adapter is put on: the manifest's model in 16-bit, in standard 4-bit, or dynamic.
    model: where the 16-bit weights are; None for the id that the manifest names.
    held_out: share of the lines that is never trained on, only evaluated; eval_data: another file instead.
    bad_data: what to do about a line that cannot be trained on: refuse the file, or skip the line.
    steps: optimizer steps; None for `epochs` passes over the data. rank: of the adapters; alpha equals it.
    batch_size: conversations that run at once; accumulation: batches a step. max_length: tokens of a line.
    optimizer: None for adamw_8bit on CUDA and adamw_torch on a CPU, for which there is no 8-bit one.
    vision: adapters in the vision tower as well. save_every: steps between checkpoints and evaluations.
    """

    manifest: Path
    data: Path
    out: Path
    base: Base = "dynamic"
    model: str | None = None
    device: str | None = None
    dtype: Dtype | None = None
    eval_data: Path | None = None
    held_out: float = 0.1
    bad_data: BadData = "refuse"
    steps: int | None = None
    epochs: float = 1.0
    rank: int = 16
    learning_rate: float = 2e-4
    batch_size: int = 1
    accumulation: int = 4
    max_length: int = 2048
    optimizer: Optimizer | None = None
    vision: bool = False
    save_every: int = 50
    seed: int = 0
