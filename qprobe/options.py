"""What a user asked of a command, as typed, and the words that options share; internal, no torch."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from qprobe.errors import QprobeError
from qprobe.registry.precisions import NF4

DEFAULT_BUDGET = "+10%"
DEFAULT_ADAPT = "language,projector"
"""Where adapters go: parts of a model or names of its modules, see `qprobe.models.adapting`."""
FOR = ("vllm",)
"""Tools whose fused groups a skip-list can be asked to keep whole."""
Dtype = Literal["bfloat16", "float16"]
Base = Literal["16-bit", "nf4", "dynamic"]
BadData = Literal["refuse", "skip"]
Turns = Literal["first", "last", "each"]
"""Which answers of a conversation count: are measured, or learned."""
Experts = Literal["4-bit", "16-bit"]
"""What fused weights of experts may be in; in 4-bit only qprobe's own loader reads them."""
KeptExperts = Literal["16-bit"]
"""Where a list is made again: all of them stay in 16-bit, whatever the scan allowed."""
Optimizer = Literal["adamw_8bit", "adamw_torch"]
Start = Literal["zero", "corrected"]
"""Where an adapter begins, see `qprobe.training.start`."""
AskedMetric = str | Callable[[Any, str], Any]
"""A declared name (`qprobe.registry.metrics`), or a function of (sample, answer) to a number."""
Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total) whenever work moves on."""


_ANY: tuple[Any, ...] = (Any, Path, Path | None, AskedMetric, AskedMetric | None)


def no_progress(stage: str, done: int, total: int) -> None:
    """The silent `Progress`."""


def check_types(options: Any) -> None:
    """Raises QprobeError where a field of the dataclass `options` holds no value of its type.

    The command line lets no other value through; a caller from Python would get something else in silence, or
    a traceback. Fields of any type, and paths, are checked where they are read.
    """
    for name, kind in get_type_hints(type(options)).items():
        given = getattr(options, name)
        try:
            if kind not in _ANY:
                msgspec.convert(given, kind, strict=True)
        except msgspec.ValidationError as error:
            words = [
                w for one in (kind, *get_args(kind)) if get_origin(one) is Literal for w in get_args(one)
            ]
            fix = (
                f"Pass one of {', '.join(map(repr, words))}" if words else str(error).replace("null", "None")
            )
            raise QprobeError(f"{name}={reprlib.repr(given)} is not taken. {fix}.") from None


def path_of(given: Any) -> Path:
    """A path that was given as text or as a path. Raises QprobeError for anything else."""
    if isinstance(given, str | PathLike):
        return Path(given)
    fix = "Pass its skiplist, or its path." if hasattr(given, "skiplist") else "Pass a path."
    raise QprobeError(f"A value of type {type(given).__name__} is given where a path is wanted. {fix}")


def path_if_given(given: Any) -> Path | None:
    """`path_of`, or None."""
    return None if given is None else path_of(given)


def names_of(given: Any) -> tuple[str, ...] | None:
    """Names that were given as a sequence, or with commas between them as on the command line."""
    if given is None or isinstance(given, str):
        return None if given is None else tuple(name.strip() for name in given.split(","))
    return tuple(given)


def data_of(given: Any) -> Any:
    """A file or an id that was given as text or as a path; rows in memory as they are."""
    return Path(given) if isinstance(given, str) else given


@dataclass(frozen=True)
class ScanOptions:
    """What `scan` was asked, as typed; its docstring says what each means."""

    model: str
    images: Path | None = None
    data: Any = None
    prompt: str | None = None
    samples: int | None = None
    format: str = NF4.name
    budget: str | None = None
    max_kl: float | None = None
    out: Path | None = None
    device: str | None = None
    dtype: Dtype | None = None
    seed: int = 0
    batch_size: int = 4
    max_new_tokens: int = 64
    by: str | None = None
    for_tool: str | None = None
    measures: tuple[str, ...] | None = None
    nodes: int = 2
    ablate: str | None = None
    max_memory: str | None = None
    tune: int | None = None
    calibration_samples: int | None = None
    keep_correction: int | None = None
    experts: Experts = "4-bit"
    turns: Turns = "each"
    split: str | None = None
    bad_data: BadData = "refuse"
    allow_downloads: bool = False
    metric: AskedMetric | None = None
    check: Path | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class CompareOptions:
    """What `compare` was asked, as typed; its docstring says what each means."""

    manifest: Path
    model: str | None = None
    images: Path | None = None
    data: Any = None
    prompt: str | None = None
    samples: int | None = None
    device: str | None = None
    dtype: Dtype | None = None
    seed: int = 0
    batch_size: int = 4
    max_new_tokens: int = 64
    turns: Turns = "each"
    split: str | None = None
    bad_data: BadData = "refuse"
    allow_downloads: bool = False
    metric: AskedMetric | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class FinetuneOptions:
    """What `finetune` was asked, as typed; its docstring says what each means."""

    manifest: Path
    data: Any
    out: Path
    base: Base = "dynamic"
    model: str | None = None
    device: str | None = None
    dtype: Dtype | None = None
    eval_data: Any = None
    held_out: float = 0.1
    turns: Turns = "each"
    split: str | None = None
    bad_data: BadData = "refuse"
    allow_downloads: bool = False
    steps: int | None = None
    epochs: float = 1.0
    rank: int = 16
    learning_rate: float = 2e-4
    batch_size: int = 1
    accumulation: int = 4
    max_length: int = 2048
    optimizer: Optimizer | None = None
    adapt: str = DEFAULT_ADAPT
    for_tool: str | None = None
    start: Start = "zero"
    save_every: int = 50
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_types(self)
