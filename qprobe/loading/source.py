"""Where a model comes from: a known name, a folder or a hub id, and what to say when it cannot be had."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from qprobe.errors import ModelError
from qprobe.models.catalogue import entries, find, nearest
from qprobe.models.entry import Entry
from qprobe.system.foreign import check_foreign
from qprobe.system.wording import SAID, shortened

_FOR_EXAMPLE = ("demo", "llama-3.2-11b-vision", "qwen2.5-vl-7b")
_READ = (".jinja", ".json", ".model", ".py", ".safetensors", ".tiktoken", ".txt")
_ADAPTER = "adapter_config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `location` is a folder or a hub id, `id` what we call it.

    trusts_code: whether Python code that the checkpoint brings may run.
    """

    id: str
    location: str
    revision: str | None = None
    trusts_code: bool = False


def resolve(model: str, trusts_code: bool = False) -> Source:
    """The source behind a catalogue alias, a local folder or a hub id.

    trusts_code: see `Source`. Raises ModelError if it is none of them, or an alias and the name of a
    checkpoint's folder here.
    """
    _refuse_no_name(model)
    folder = Path(model).expanduser()
    entry = find(model)
    if folder.is_dir() and (entry is None or _is_checkpoint(folder)):
        if entry is not None and entry.alias == model.lower():
            raise _two_of_that_name(model, entry)
        return _of_folder(model, folder, trusts_code)
    if entry is not None:
        return _of_entry(entry, trusts_code)
    if folder.parent.is_dir() and folder.parent.name and not folder.exists():
        raise ModelError(
            f"There is a folder {folder.parent} here, but none in it called {folder.name!r}. Pass the "
            "checkpoint's folder; if a hub id is meant, run the command from another folder."
        )
    if is_hub_id(model):
        return Source(model, model, trusts_code=trusts_code)
    near = nearest(model)
    meant = f"Did you mean {', '.join(near)}?" if near else f"Some of them: {', '.join(_FOR_EXAMPLE)}."
    raise ModelError(
        f"No model {model!r}: it is no folder, no hub id (owner/name) and none of the {len(entries())} known "
        f"names. {meant} `qprobe models` lists what is known."
    )


def _refuse_no_name(model: object) -> None:
    if not isinstance(model, str):
        raise ModelError(
            f"The model is of type {type(model).__name__}, where weights are read from files. Save it with "
            "save_pretrained, its processor too, and pass the folder."
        )
    if not model.strip():
        raise ModelError("The model is an empty name. Pass a folder, a hub id (owner/name) or a known name.")


def _two_of_that_name(model: str, entry: Entry) -> ModelError:
    elsewhere = f"pass {entry.hub_id}" if entry.hub_id else "run the command from another folder"
    return ModelError(
        f"{model!r} is both a model that qprobe knows and a folder with a model here. Pass ./{model} for "
        f"the folder; for the known model {elsewhere}."
    )


def _of_folder(model: str, folder: Path, trusts_code: bool) -> Source:
    _refuse_irregular(folder)
    if not _is_checkpoint(folder):
        raise ModelError(
            f"Folder {model} holds no config.json, so it is no model. Pass the checkpoint's folder."
        )
    if (folder / _ADAPTER).exists():
        raise ModelError(
            f"Folder {model} holds an adapter ({_ADAPTER}) beside its model, which transformers would "
            "put into it. Merge it first, or move its files into a folder of their own."
        )
    return Source(folder.resolve().name, str(folder), trusts_code=trusts_code)


def _of_entry(entry: Entry, trusts_code: bool) -> Source:
    if entry.hub_id is not None:
        return Source(entry.hub_id, entry.hub_id, trusts_code=trusts_code)
    from qprobe.demo.folder import demo_folder
    from qprobe.demo.outliers import outliers_folder

    embedded = {"demo": demo_folder, "demo-outliers": outliers_folder}
    return Source(entry.alias, str(embedded[entry.alias]()))


def _refuse_irregular(folder: Path) -> None:
    """Raises ModelError for a pipe or a device where transformers looks for a file: it would wait forever."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ and path.exists() and not path.is_file() and not path.is_dir():
            check_foreign(path, ModelError, "Copy the checkpoint again.", None)


def is_hub_id(name: str) -> bool:
    """True if `name` is written as owner/name; a relative path of a folder may be, too."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith((".", "/"))


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def at_revision(source: Source, revision: str | None) -> Source:
    """`source` at `revision`; unchanged where it is a folder, which has none."""
    return source if Path(source.location).is_dir() else replace(source, revision=revision)


def known(model: str) -> Entry | None:
    """The catalogue's entry for `model`; None for a folder, and for what the catalogue does not know."""
    return None if _is_checkpoint(Path(model).expanduser()) else find(model)


# What transformers raises at files that are missing or broken, some of it far from where it reads them.
_KINDS = (
    OSError, ValueError, LookupError, ImportError, TypeError, AttributeError, RecursionError, SafetensorError,
)  # fmt: skip
# tokenizers (Rust) raises bare Exceptions at what it does not read, and where it panics a BaseException of a
# class that no module offers to import.
_PANIC = "PanicException"


class explained:
    """Turns what transformers raises for a model it cannot load into one sentence."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _KINDS) or type(error) is Exception or type(error).__name__ == _PANIC:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            advice = _advice(self.source)
            raise ModelError(
                f"Model {self.source.id!r} cannot be loaded: {shortened(first, SAID)} {advice}"
            ) from error


def _advice(source: Source) -> str:
    """What to do when the files of `source` cannot be had."""
    if Path(source.location).exists():
        return "Check that the folder is a complete transformers checkpoint with safetensors files."
    entry = find(source.location)
    if entry is None:
        return (
            "Check the name and the network; for a gated model accept its licence on the hub "
            "and run `hf auth login`, or pass a local folder."
        )
    licence = f"accept its licence at https://huggingface.co/{entry.hub_id}, run `hf auth login`, and "
    return (
        f"To have its weights, {licence if entry.is_gated else ''}check the network, or pass a local folder; "
        f"`qprobe plan --model {entry.alias}` needs neither."
    )
