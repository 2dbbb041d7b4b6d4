"""The nouns that all rooms share: frozen dataclasses."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log10, nan
from pathlib import Path
from typing import Literal

from qprobe.registry.precisions import NF4, Precision, find, precision

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Video:
    """A video: its frames in order, each an image as the bytes of its file or the path of it.

    is_file: `frames` is one file that holds them all, an animated image or a video file.
    """

    frames: tuple[bytes | Path, ...] = field(repr=False)
    is_file: bool = False


Part = str | bytes | Path | Video
"""Of a turn: text, an image as the bytes of its file or the path of it, or a video."""


@dataclass(frozen=True)
class Fact:
    """One thing an answer must state: `name` says which ("angle"), `phrase` how it is said."""

    name: str
    phrase: str

    def stated_in(self, answer: str) -> bool:
        """True if the phrase stands in `answer` as whole words, upper and lower case alike."""
        pattern = rf"(?<!\w){re.escape(self.phrase)}(?!\w)"
        return re.search(pattern, answer, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Turn:
    """What one side says: texts, images and videos in order. learned: whether an answer counts as one."""

    role: Role
    parts: tuple[Part, ...] = field(repr=False)
    learned: bool = True

    @property
    def text(self) -> str:
        """Its texts alone, one line each."""
        return "\n".join(x.strip() for x in self.parts if isinstance(x, str) and x.strip())

    @property
    def seen(self) -> tuple[bytes | Path | Video, ...]:
        """Its images and videos, in their order."""
        return tuple(x for x in self.parts if not isinstance(x, str))


def asked(prompt: str, image: bytes | None = None) -> tuple[Turn, ...]:
    """One question, below its image if there is one."""
    return (Turn("user", (prompt,) if image is None else (image, prompt)),)


@dataclass(frozen=True)
class Sample:
    """What a model reads, and the answer on whose tokens damage counts.

    turns: all that stands before the answer; the last one is the user's. Images, and the frames of videos,
        are the bytes of image files.
    answer: None until it is known; then the reference's own greedy answer is used.
    ends: True if the end-of-answer token belongs to the answer (False for one cut at a length limit).
    """

    id: str
    turns: tuple[Turn, ...]
    answer: str | None = None
    ends: bool = True
    facts: tuple[Fact, ...] = ()
    kind: str | None = None

    @property
    def prompt(self) -> str:
        """The text of the question that is answered."""
        return self.turns[-1].text

    @property
    def images(self) -> tuple[bytes, ...]:
        """The images of all turns, in their order."""
        return tuple(x for x in self.seen if isinstance(x, bytes))

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos of all turns, in their order."""
        return tuple(x for x in self.seen if isinstance(x, Video))

    @property
    def seen(self) -> tuple[bytes | Path | Video, ...]:
        """The images and videos of all turns, in their order."""
        return tuple(x for turn in self.turns for x in turn.seen)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that is read and the answer; names and facts do not enter it."""
        sha = hashlib.sha256()
        for part in (*self._read(), (self.answer or "").encode()):
            sha.update(len(part).to_bytes(8, "little"))
            sha.update(part)
        return sha.hexdigest()

    def _read(self) -> Iterator[bytes]:
        """Image and prompt of a single question, or else every part behind its kind."""
        parts = self.turns[0].parts
        match parts:
            case (str() as prompt,) if len(self.turns) == 1:
                yield from (b"", prompt.encode())
            case (bytes() as image, str() as prompt) if len(self.turns) == 1:
                yield from (image, prompt.encode())
            case _:
                for turn in self.turns:
                    yield turn.role.encode()
                    for part in turn.parts:
                        yield from _told(part)


def _told(part: Part) -> Iterator[bytes]:
    """What a part is, and then its bytes."""
    if isinstance(part, Video):
        yield from (b"video", str(len(part.frames)).encode())
        for frame in part.frames:
            yield from _told(frame)
        return
    assert not isinstance(part, Path), "a sample holds its images"
    yield from (b"text", part.encode()) if isinstance(part, str) else (b"image", part)


@dataclass(frozen=True)
class Score:
    """What one answer scores by a metric: `value` out of `weight`; a weight of 0 means it does not count."""

    value: float = 0.0
    weight: int = 0


@dataclass(frozen=True)
class ErrorSums:
    """Squared-error sums of a quantity against its reference; `+` is the merge.

    n: pairs summed. signal, noise: sums of squares of the reference and of the error.
    nonfinite: pairs left out because either side was NaN or infinite.
    """

    n: int = 0
    signal: float = 0.0
    noise: float = 0.0
    nonfinite: int = 0

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.n + other.n,
            self.signal + other.signal,
            self.noise + other.noise,
            self.nonfinite + other.nonfinite,
        )

    @property
    def nmse(self) -> float:
        """noise / signal; NaN (unknown) where nothing was summed or the signal is zero."""
        return self.noise / self.signal if self.n and self.signal > 0 else nan

    @property
    def sqnr_db(self) -> float:
        """-10 log10(nmse), in decibel; infinite for an exact copy."""
        nmse = self.nmse
        return float("inf") if nmse == 0 else -10 * log10(nmse)


@dataclass(frozen=True)
class Linear:
    """One `nn.Linear` of a model, or one fused weight of experts, in execution order of its list.

    name: module name in the running transformers, of experts that of the parameter. checkpoint_name: its name
        in the files.
    tower: "vision", "projector", "cross_attention", "language" or "other".
    group: layers that must change precision together (q/k/v, gate/up); the layer's own name if alone.
    shape: (out_features, in_features), with the number of experts before them where they share one weight.
    bytes_4bit, bytes_16bit: of the weight alone; a weight tied to an embedding is counted here and not in the
        inventory's other_bytes.
    fixed: why it stays in 16-bit whatever the budget ("lm_head", "tied", "kept in float32 by transformers",
        "its module reads the weight itself", `EXPERTS_AS_ASKED`), or None.
    reads: the kind of tokens it reads.
    transposed: the weight is stored as (experts, in_features, out_features), along which it is rounded.
    """

    name: str
    checkpoint_name: str
    tower: str
    group: str
    shape: tuple[int, ...]
    bytes_4bit: int
    bytes_16bit: int
    fixed: str | None = None
    reads: Literal["vision", "text"] = "text"
    transposed: bool = False

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """`shape` in the order in which the weight is stored."""
        return (*self.shape[:-2], self.in_features, self.out_features) if self.transposed else self.shape

    @property
    def experts(self) -> int | None:
        """How many experts share the weight; None for a plain linear."""
        return self.shape[0] if len(self.shape) == 3 else None


@dataclass(frozen=True)
class Uncovered:
    """A weight that 4-bit loading never touches though a reader may expect it to, and why."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was measured.

    id: catalogue alias or hub id ("demo", "meta-llama/..."); a local folder gives its name, never its path.
    fingerprint: hash of the architecture and of every parameter's name, shape and dtype.
    """

    id: str
    revision: str | None
    architecture: str
    fingerprint: str


@dataclass(frozen=True)
class FormatSpec:
    """How 4-bit layers are stored; `compute_dtype` is the 16-bit dtype of all else.

    experts: what fused weights of experts may be in. In 4-bit only `qprobe.load_dynamic_4bit` reads them.
    """

    name: str = NF4.name
    blocksize: int = 64
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    experts: Literal["4-bit", "16-bit"] = "4-bit"

    @property
    def precision(self) -> Precision:
        """The declaration of the 4-bit precision. Raises QprobeError for a name that is not declared."""
        return precision(self.name)

    @property
    def four_bit_name(self) -> str:
        """What a manifest calls the precision of the layers in 4-bit."""
        return self.precision.stored.name

    @property
    def quant_type(self) -> str:
        """What the library that loads it calls it; its own name for one that is not declared."""
        declared = find(self.name)
        return (declared and declared.quant_type) or self.name

    @property
    def is_calibrated(self) -> bool:
        """True if the codes of each layer were chosen on samples, and lie in a file of their own."""
        return self.precision.is_calibrated

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of `shape` in 4-bit."""
        return self.precision.bytes_of(shape, self.blocksize, self.double_quant)


@dataclass(frozen=True)
class CodesFile:
    """A file of calibrated weights (`qprobe.formats.codes_file`). sha256: of its bytes, hex.

    file: its path from the folder of what names it, with "/" between folders.
    """

    file: str
    sha256: str


EXPERTS_AS_ASKED = "experts in 16-bit as asked"
"""Why fused weights of experts are fixed where the format keeps them so."""


@dataclass(frozen=True)
class Inventory:
    """Every linear of a model, and the bytes around them.

    layers: in execution order once the model ran, in module order before.
    uncovered: weights that 4-bit loading leaves alone although they multiply (see `Uncovered`).
    other_bytes: every parameter and persistent buffer that is no weight of `layers`
        (embeddings, norms, biases, convolutions, uncovered weights); storage that two names share
        counts once.
    """

    layers: tuple[Linear, ...]
    uncovered: tuple[Uncovered, ...]
    other_bytes: int

    def total_bytes(self, kept: frozenset[str]) -> int:
        """Bytes of the model with `kept` (names) and the fixed layers in 16-bit and the rest in NF4."""
        return self.other_bytes + sum(
            x.bytes_16bit if x.fixed or x.name in kept else x.bytes_4bit for x in self.layers
        )

    @property
    def standard_4bit_bytes(self) -> int:
        """Bytes with every linear but the fixed ones in NF4."""
        return self.total_bytes(frozenset())

    @property
    def with_experts_kept(self) -> Inventory:
        """The same with fused weights of experts fixed in 16-bit."""
        layers = (
            replace(x, fixed=x.fixed or EXPERTS_AS_ASKED) if x.experts is not None else x for x in self.layers
        )
        return replace(self, layers=tuple(layers))


@dataclass(frozen=True)
class Scan:
    """What is known of a scan: what it measured, and what its processes remarked (see `qprobe.runs.folder`).

    unmeasured: names of linears that never ran on the samples.
    notes: sentences a reader must see (skipped files, measures that do not apply, warnings).
    codes: the calibrated weights, beside scan.json; None before they are there, and for formats without.
    readout: what damage is measured on, see `qprobe.runs.key.DAMAGE`.
    """

    model: ModelIdentity
    format: FormatSpec
    inventory: Inventory
    status: Literal["running", "finished"] = "running"
    unmeasured: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    codes: CodesFile | None = None
    readout: str = "answers"
