"""The options of each command, as typed: each declared once, with its type and its default; no torch.

From a declaration follow the keywords of the Python function (`takes`) and the flags of the command line
(`qprobe.cli.options.declared`). Options are parsed where the function begins, its door, and not below.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import wraps
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from qprobe.errors import QprobeError
from qprobe.registry.precisions import NF4

DEFAULT_BUDGET = "+10%"
DEFAULT_ADAPT = "language,projector"
"""Where adapters go: parts of a model or names of its modules, see `qprobe.models.adapting`."""
FOR = ("vllm",)
"""Tools whose fused groups a skip-list can be asked to keep whole."""
Dtype = Literal["bfloat16", "float16"]
DEFAULT_DTYPE: Dtype = "bfloat16"
Base = Literal["16-bit", "nf4", "dynamic"]
Form = Literal["16-bit", "4-bit"]
"""Of the weights that an adapter is merged into."""
BadData = Literal["refuse", "skip"]
Turns = Literal["first", "last", "each"]
"""Which answers of a conversation count: are measured, or learned."""
Experts = Literal["4-bit", "16-bit"]
"""What fused weights of experts may be in; in 4-bit only qprobe's own loader reads them."""
KeptExperts = Literal["16-bit"]
"""Where a list is made again: all of them stay in 16-bit, whatever the scan allowed."""
Optimizer = Literal["adamw_8bit", "adamw_torch"]
Start = Literal["zero", "corrected"]
"""Where an adapter begins: at nothing, or at the correction that calibration left."""
AskedPath = str | Path
EMPTY_PATH = "The path is empty, as an unset variable leaves it. Pass one; '.' is the folder you are in."
AskedMetric = str | Callable[[Any, str], Any]
"""A declared name (`qprobe.registry.metrics`), or a function of (sample, answer) to a number."""
Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total) whenever work moves on."""


P = ParamSpec("P")
Options = TypeVar("Options")
R = TypeVar("R")


def no_progress(stage: str, done: int, total: int) -> None:
    """The silent `Progress`."""


def takes(options: Callable[P, Options]) -> Callable[[Callable[[Options], R]], Callable[P, R]]:
    """What makes a function of `options`, a dataclass, one of its fields, with their names and defaults.

    Raises TypeError for an option that it does not have, which names the one that was meant.
    """
    signature = inspect.signature(options)
    known = list(signature.parameters)

    def decorate(function: Callable[[Options], R]) -> Callable[P, R]:
        """`function` with the options as its own arguments."""

        @wraps(function)
        def call(*args: P.args, **named: P.kwargs) -> R:
            """`function` of the options that were passed."""
            for name in named:
                if name not in known:
                    near = get_close_matches(name, known, 1)
                    meant = f"Did you mean {near[0]}?" if near else f"Its options are {', '.join(known)}."
                    raise TypeError(f"{function.__name__} has no option {name!r}. {meant}")
            signature.bind(*args, **named)  # a TypeError of it names no dataclass
            return function(options(*args, **named))

        returned = inspect.signature(function).return_annotation
        call.__dict__["__signature__"] = signature.replace(return_annotation=returned)
        return call

    return decorate


def flag_of(name: str) -> str:
    """The option of a command line for the field `name`."""
    return {"for_tool": "--for", "as_": "--as"}.get(name, f"--{name.replace('_', '-')}")


def words_of(kind: Any) -> tuple[str, ...]:
    """The words that an option of the type `kind` takes; empty if it takes any."""
    parts = (kind, *get_args(kind))
    return tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))


def check_types(options: Any) -> None:
    """Raises QprobeError where a field of the dataclass `options` holds no value of its type.

    The command line lets no other value through; a caller from Python would get something else in silence, or
    a traceback. Fields of any type, paths and functions are checked where they are read.
    """
    for name, kind in get_type_hints(type(options)).items():
        given = getattr(options, name)
        try:
            if _is_plain(kind):
                msgspec.convert(given, kind, strict=True)
        except msgspec.ValidationError as error:
            words = ", ".join(map(repr, words_of(kind)))
            fix = f"Pass one of {words}" if words else str(error).replace("null", "None")
            raise QprobeError(f"{name}={reprlib.repr(given)} is not taken. {fix}.") from None


def _is_plain(kind: Any) -> bool:
    """True for words, texts and numbers, and for a choice of them or None."""
    parts = (kind,) if get_origin(kind) in (None, Literal) else get_args(kind)
    return all(x in (str, int, float, bool, NoneType) or get_origin(x) is Literal for x in parts)


def path_of(given: Any) -> Path:
    """A path that was given as text or as a path. Raises QprobeError for anything else, an empty text too."""
    if isinstance(given, str) and not given:
        raise QprobeError(EMPTY_PATH)
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
    return path_of(given) if isinstance(given, str) else given


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is loaded. Like the next two, fields that commands share: inherited, without behaviour."""

    device: str | None = None
    dtype: Dtype | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How data is read."""

    turns: Turns = "each"
    split: str | None = None
    bad_data: BadData = "refuse"
    allow_downloads: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleOptions(DataOptions):
    """Which samples, and how they run. images, data: as `scan` takes them."""

    images: Any = None
    data: Any = None
    prompt: str | None = None
    samples: int | None = None
    seed: int = 0
    batch_size: int = 4
    max_new_tokens: int = 64
    metric: AskedMetric | None = None


@dataclass(frozen=True, kw_only=True)
class ScanOptions(ModelOptions, SampleOptions):
    """What `scan` was asked, as typed; its docstring says what each means."""

    model: Any = field(kw_only=False)
    processor: Any = None
    format: str = NF4.name
    budget: str | None = None
    max_kl: float | None = None
    out: AskedPath | None = None
    check: AskedPath | None = None
    by: str | None = None
    for_tool: str | None = None
    measures: str | Sequence[str] | None = None
    nodes: int = 2
    ablate: str | int | None = None
    max_memory: str | int | None = None
    tune: int | None = None
    calibration_samples: int | None = None
    drawn_texts: int = 0
    keep_correction: int | None = None
    check_data: Any = None
    experts: Experts = "4-bit"
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class PlanScanOptions(ModelOptions):
    """What `plan_scan` was asked, as typed; its docstring says what each means."""

    model: str = field(kw_only=False)
    samples: int | None = None
    batch_size: int = 4
    tokens: int = 512
    answer_tokens: int = 64
    tiles: int = 4
    format: str = NF4.name
    tune: int | None = None
    drawn_texts: int = 0
    max_memory: str | int | None = None
    experts: Experts = "4-bit"

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ModelOptions, SampleOptions):
    """What `compare` was asked, as typed; its docstring says what each means."""

    manifest: AskedPath = field(kw_only=False)
    model: str | None = None
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class MergeOptions(ModelOptions, SampleOptions):
    """What `merge` was asked, as typed; its docstring says what each means."""

    adapter: AskedPath = field(kw_only=False)
    out: AskedPath
    as_: Form | None = None
    manifest: AskedPath | None = None
    base: Base | None = None
    model: str | None = None
    for_tool: str | None = None
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(ModelOptions, DataOptions):
    """What `finetune` was asked, as typed; its docstring says what each means."""

    manifest: AskedPath = field(kw_only=False)
    data: Any
    out: AskedPath
    base: Base = "dynamic"
    model: str | None = None
    eval_data: Any = None
    held_out: float = 0.1
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
    start: Start | None = None
    distill: int = 0
    workers: int | None = None
    save_every: int = 50
    seed: int = 0
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        check_types(self)
