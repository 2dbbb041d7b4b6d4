"""Every reader of files that somebody else may have written, with a good file of each to begin from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from safetensors.numpy import save

from qprobe.errors import ManifestError, ModelError, RunError
from qprobe.exports.languages import Language
from qprobe.exports.lists import match_list, read_list
from qprobe.exports.targets import autoround, gptqmodel, llama_cpp, llm_compressor, peft
from qprobe.manifest.read import read_manifest
from qprobe.models.headers import INDEX, SINGLE, read_config, read_headers
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.ranks import parse_ranks
from qprobe.runs.layers.table import write_table
from qprobe.runs.notes import TOPICS
from qprobe.runs.shown import parse_shown
from qprobe.system.headers.tensors import read_tensor_header
from tests.fuzz.loading import checkpoint_files, rows_and_images
from tests.runs.runs import four_layers, make_run, output

RULES = (peft.rule, autoround.rule, gptqmodel.rule, llm_compressor.rule, llama_cpp.rule)
LANGUAGES = tuple(Language("a rule", (), lambda _, rule=rule: rule) for rule in RULES)


@dataclass(frozen=True)
class Reader:
    """read: of the bytes; may raise `errors`, no other. seeds: good files, as bytes."""

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    errors: tuple[type[Exception], ...]


def readers(folder: Path) -> Mapping[str, Reader]:
    """By name. folder: an empty one, in which they may write."""
    run = make_run(folder / "run", outputs=[pd.DataFrame([output("a", "model.a", 1.0, 0.1)])])
    write_table(RunFolder(run))
    unit = (run / "units" / "outputs-00000.parquet").read_bytes()
    tensors = save({"a.weight": pd.Series([1.0, 2.0]).to_numpy(), "b": pd.Series([1]).to_numpy()})
    found = {
        "manifest": Reader(_file(folder / "m.json", read_manifest), (_manifest(),), (ManifestError,)),
        "list": Reader(_file(folder / "l.json", _matched), _LISTS, (ManifestError,)),
        "config.json": Reader(_placed(folder, "config.json", read_config), _LISTS[1:], (ModelError,)),
        "safetensors": Reader(_placed(folder, SINGLE, read_headers), (tensors,), (ModelError,)),
        "tensor header": Reader(lambda x: _header(folder / "h", x), (tensors,), (ValueError,)),
        "index": Reader(_placed(folder / "sharded", INDEX, read_headers), (_INDEX,), (ModelError,)),
        "unit": Reader(_within(run, "units/outputs-00000.parquet", _units), (unit,), (RunError,)),
        "ranks.csv": Reader(lambda x: parse_ranks(run / "ranks.csv", x), (_RANKS,), (RunError,)),
        "samples.json": Reader(lambda x: parse_shown(run / "samples.json", x), (_SHOWN,), (RunError,)),
        "notes": Reader(lambda x: _notes(run, x), _NOTES, (RunError,)),
    }
    for name, read in (("scan.json", _key), ("files.json", _derived), ("layers.csv", _table)):
        found[name] = Reader(_within(run, name, read), ((run / name).read_bytes(),), (RunError,))
    for name, (read, seeds, error) in {
        **rows_and_images(folder / "data"),
        **checkpoint_files(folder / "model"),
    }.items():
        found[name] = Reader(read, seeds, (error,))
    return found


_LISTS = (
    json.dumps(["model.a", r"model\.[qk]$", "re:.*b", "-:model", "(a|b)*c"]).encode(),
    json.dumps(
        {
            "transformers_version": "5.0.0",
            "torch_dtype": "bfloat16",
            "quantization_config": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": "bfloat16",
                "llm_int8_skip_modules": ["model.a", "lm_head"],
            },
        }
    ).encode(),
)
_INDEX = json.dumps({"weight_map": {"a.weight": "one.safetensors", "b": "one.safetensors"}}).encode()
_RANKS = b"layer,score,rank,rank_low,rank_high\nmodel.a,0.5,1,1,2\nmodel.b,0.25,2,1,2\n"
_SHOWN = json.dumps(
    [
        {
            "id": "a", "prompt": "p", "answer": None, "thumbnail": "data:image/jpeg;base64,AAAA",
            "size": [3, 4], "tokens": ["x", None], "grid": None, "decoded": ["y"],
        }
    ]
).encode()  # fmt: skip
_NOTES = (
    b'{"notes": ["one", "two"]}',
    b'{"unmeasured": ["a"], "notes": []}',
    b'{"file": "a.safetensors", "sha256": "00"}',
    b'{"seconds": {"a": 1.5}, "peak_bytes": null, "notes": [], "verdict": "v", "metric": null}',
)


def _manifest() -> bytes:
    from qprobe.manifest.write import manifest_to_json
    from tests.exports.manifests import manifest_of

    made = manifest_of({"model.a": True, "model.b": False, "lm_head": True})
    return json.dumps(manifest_to_json(made)).encode()


def _file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def one(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return one


def _placed(folder: Path, name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    place = folder / f"of-{name}"
    place.mkdir(parents=True)
    (place / "one.safetensors").write_bytes(save({"a.weight": pd.Series([1.0]).to_numpy()}))

    def one(data: bytes) -> object:
        (place / name).write_bytes(data)
        return read(place)

    return one


def _within(run: Path, name: str, read: Callable[[RunFolder], object]) -> Callable[[bytes], object]:
    good = (run / name).read_bytes()

    def one(data: bytes) -> object:
        (run / name).write_bytes(data)
        try:
            return read(RunFolder(run))
        finally:
            (run / name).write_bytes(good)

    return one


def _matched(path: Path) -> object:
    """The list under every tool's rule."""
    given = read_list(path)
    for one in (given.language, *LANGUAGES):
        match_list(given.entries or (), four_layers(), one, "LlamaForCausalLM")
    return given


def _header(path: Path, data: bytes) -> object:
    path.write_bytes(data)
    with io.FileIO(path) as file:
        return read_tensor_header(file)  # pyright: ignore[reportArgumentType]


def _units(run: RunFolder) -> object:
    return run.units("outputs")


def _key(run: RunFolder) -> object:
    return run.key


def _table(run: RunFolder) -> object:
    (run.path / "files.json").unlink(missing_ok=True)  # else every change is known by its digest
    return run.table


def _derived(run: RunFolder) -> object:
    return run.files.read("layers.csv")


def _notes(run: Path, data: bytes) -> None:
    """Every topic, each error but the last one dropped: a file can be of one topic only."""
    error: RunError | None = None
    for topic in TOPICS:
        (run / "notes" / f"{topic}.json").write_bytes(data)
        try:
            RunFolder(run).notes.get(topic)
        except RunError as found:
            error = found
        (run / "notes" / f"{topic}.json").unlink()
    if error is not None:
        raise error
