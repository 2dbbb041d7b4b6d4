"""Loading weights into a model, and proof that every one of them came from the files.

transformers fills in what a checkpoint lacks with random numbers and logs a table. Here what a file lacks, or
holds in another shape, is an error that names it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qprobe.errors import ModelError
from qprobe.loading.config import model_class
from qprobe.loading.inventory import settle
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.source import Source, explained
from qprobe.models.headers import StoredTensor, read_headers
from qprobe.system.log_filters import Remark, without_remarks
from qprobe.system.wording import counted, is_or_are, named

REPORT = Remark("transformers.modeling_utils", "LOAD REPORT", "what it lists is said here, in a sentence")
_TIED = Remark("transformers.modeling_utils", "The tied weights mapping", "the same")
_ABSENT = Remark("transformers.modeling_utils", "This checkpoint seem corrupted", "the same")


def load_pretrained(skeleton: Skeleton, **options: Any) -> Any:
    """The model of `skeleton` with the weights of its files, and with no other; options: of from_pretrained.

    Raises ModelError, naming them, for tensors that the files lack or hold in another shape, and where files
    and config disagree about tied weights; a folder's before any weight is read.
    """
    source = skeleton.source
    check_files(skeleton)
    with explained(source), without_remarks(REPORT, _TIED, _ABSENT):
        model, found = model_class(skeleton.config).from_pretrained(
            source.location,
            revision=source.revision or "main",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # else an error without a name
            output_loading_info=True,
            trust_remote_code=source.trusts_code,
            **options,
        )
    refuse_incomplete(source, model, found)
    settle(model)
    return model


@lru_cache(maxsize=4)
def check_files(skeleton: Skeleton) -> None:
    """Raises ModelError as `load_pretrained` does, by the headers of a folder; nothing for one on the hub.

    transformers itself is asked: it loads tensors without data, on the meta device.
    """
    refuse_quantized(skeleton)
    folder = Path(skeleton.source.location)
    if folder.is_dir() and skeleton.is_buildable:
        check_folder(skeleton, folder)


def check_folder(skeleton: Skeleton, folder: Path) -> None:
    """`check_files` of a checkpoint that lies in `folder`, which may be one of the hub's that was fetched."""
    tensors = read_headers(folder)
    refuse_incomplete(skeleton.source, skeleton.model, loading_info(skeleton, tensors))
    refuse_untied(skeleton, folder, tensors)


def refuse_quantized(skeleton: Skeleton) -> None:
    """Raises ModelError for a checkpoint that is quantized already."""
    found = getattr(skeleton.config, "quantization_config", None)
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise ModelError(
        f"{skeleton.source.id!r} is quantized already, by {getattr(method, 'value', method)!r}"
        ", so its 16-bit weights are not there. Pass the 16-bit checkpoint that it was made from."
    )


def loading_info(skeleton: Skeleton, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What transformers says of loading `tensors`, without their data, into the model: `missing_keys`, ...

    Raises ModelError if it cannot convert them.
    """
    config = copy.deepcopy(skeleton.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of packed weights `tensors` has the shapes that they stand for
    state = {n: torch.empty(x.shape, dtype=_DTYPES.get(x.dtype), device="meta") for n, x in tensors.items()}
    cls: Any = type(skeleton.model)
    with explained(skeleton.source), without_remarks(REPORT, _ABSENT):
        _, found = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map={"": "meta"},
            dtype=skeleton.model.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return found


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def refuse_incomplete(source: Source, model: nn.Module, found: Mapping[str, Any]) -> None:
    """Raises ModelError with the first of `incomplete`.

    Tensors that the model has no place for are logged as a warning, once.
    """
    for problem in incomplete(source, model, found):
        raise ModelError(
            f"{problem} Check that the checkpoint is complete and its config.json belongs to it."
        )
    surplus = sorted(found["unexpected_keys"])
    if surplus:
        _warn(
            f"The files of {source.id!r} hold {counted(len(surplus), 'tensor')} that {type(model).__name__} "
            f"has no place for and that {is_or_are(len(surplus))} ignored: {named(surplus)}."
        )


def incomplete(source: Source, model: nn.Module, found: Mapping[str, Any]) -> Iterator[str]:
    """What the files did not fill by `found`, of transformers' loading; one sentence for each kind."""
    missing = sorted(found["missing_keys"])
    unlike = [
        f"{x} is {list(there)}, not {list(wanted)}" for x, there, wanted in sorted(found["mismatched_keys"])
    ]
    kind, random = type(model).__name__, "which transformers fills with random numbers"
    if missing:
        yield (
            f"The files of {source.id!r} lack {counted(len(missing), 'tensor')} of {kind}, {random}: "
            f"{named(missing)}.{_hint(model, missing)}"
        )
    if unlike:
        yield (
            f"The files of {source.id!r} hold {counted(len(unlike), 'tensor')} in another shape than {kind} "
            f"has, {random}: {named(unlike)}."
        )


@cache
def _warn(sentence: str) -> None:
    """Logs `sentence` once for each process: commands load a model several times."""
    logging.getLogger("qprobe").warning(sentence)


def _hint(model: Any, missing: Collection[str]) -> str:
    """What explains a head that is missing alone."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    named = {name for name, p in model.named_parameters() if head is not None and p is head.weight}
    return " If its head is tied to the embedding, its config must say so." if named == set(missing) else ""


def refuse_untied(skeleton: Skeleton, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises ModelError if the config ties two weights that the files hold with different values.

    transformers then ties nothing, so that the model would have other layers than its config says.
    """
    for name, other in _tied_in_files(skeleton.model, tensors):
        first, second = (_read(folder, tensors[x].file, x) for x in (name, other))
        if first.shape != second.shape or not torch.equal(first, second):
            raise ModelError(
                f"The config of {skeleton.source.id!r} ties {name} and {other}, but its files hold them with "
                "different values, so nothing was loaded. Write tie_word_embeddings: false into config.json "
                "if both belong to the model, else delete one of them from the files."
            )


def _tied_in_files(model: Any, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, str]]:
    """Pairs of tensors in the files that the model ties."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in tensors and source in tensors:
            yield source, target


def _read(folder: Path, file: str, name: str) -> torch.Tensor:
    with safe_open(folder / file, framework="pt") as opened:
        return opened.get_tensor(name)
