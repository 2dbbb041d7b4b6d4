"""The processor of a model, or its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import __version__ as transformers_version

from qprobe.errors import ModelError
from qprobe.loading.config import load_config
from qprobe.loading.source import Source, explained
from qprobe.system.wording import SAID, shortened

# How transformers names what is missing: "`num2words` is required", "requires the torchvision library".
_MISSING = re.compile(r"[Pp]ackage `([\w-]+)`|requires the (\S+) library|No module named '([\w-]+)'")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_ABSENT = (OSError, ValueError, KeyError)  # what transformers raises where files are missing or broken


def load_processor(source: Source) -> Any:
    """The processor of `source`, its tokenizer if it has no processor, None if it has neither.

    Raises ModelError, with what to install, where it needs a package that is not here; where it exists only
    as code that may not run; for files that are broken; and for a model that sees whose processor cannot be
    loaded.
    """
    with explained(source):
        return _loaded(source)


def pad_tokenizer(tokenizer: Any) -> None:
    """Give `tokenizer` a token to pad with where it has none: the end's, or else the unknown one."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token


def name_padding(model: Any, processor: Any) -> None:
    """Let the config of a classifier of texts name what its tokenizer pads with, where it names nothing.

    It reads the last token that is no padding, and takes no batch without knowing which that is.
    """
    config = model.config.get_text_config()
    if processor is None or getattr(config, "pad_token_id", None) is not None:
        return
    if type(model).__name__.endswith(("ForSequenceClassification", "ForRewardModel")):
        tokenizer = getattr(processor, "tokenizer", processor)
        pad_tokenizer(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id


def _loaded(source: Source) -> Any:
    try:
        with _never_asking():
            found = _processor(source)
            return None if _is_empty(found) else _with_images(source, found)
    except ImportError as error:
        found = _MISSING.search(str(error))
        name = next(filter(None, found.groups()), "").lower() if found else None
        name = "torchvision" if name is None and "torchvision" in str(error).lower() else name
        needs = name or "a package that is not installed"
        advice = f"`pip install {name}`" if name else f"({_first(error)})"
        raise ModelError(
            f"The processor of {source.id!r} needs {needs} with transformers {transformers_version}. "
            f"Install it with {advice}, or a newer transformers."
        ) from error


def _processor(source: Source) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    options = _options(source)
    try:
        return AutoProcessor.from_pretrained(source.location, **options)
    except ImportError as error:
        if "VideoProcessor" not in str(error):
            raise
        return _without_video(source, options)
    except _ABSENT as error:
        full = _processor_class(source)
        if full is not None and "torchvision" in str(error) and "video_processor" in full.get_attributes():
            return _without_video(source, options)  # of a video_preprocessor_config.json that names no class
        if full is not None and _asks_for_code(error):
            return full.from_pretrained(source.location, **options)  # transformers has a class of its own
        why = error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
    except _ABSENT as error:
        if not _asks_for_code(error):
            _refuse_broken(source, error)
            return None
        raise ModelError(
            f"The tokenizer of {source.id!r} exists only as code that its checkpoint brings, and qprobe runs "
            "no such code unasked. Read it, and pass --trust-remote-code if you trust it: it can do on this "
            "machine whatever you can."
        ) from error
    if not _is_empty(tokenizer):
        _refuse_blind(source, full, why)
    return tokenizer


def _with_images(source: Source, found: Any) -> Any:
    """`found`, or with the image processor beside it a pair of both, where `found` is the tokenizer of a
    decoder behind an encoder of images: no file names a class that joins them (ViT ahead of BERT or GPT-2).
    """
    from transformers import AutoImageProcessor, TrOCRProcessor

    if hasattr(found, "image_processor") or _model_type(source) != "vision-encoder-decoder":
        return found
    try:
        return TrOCRProcessor(AutoImageProcessor.from_pretrained(source.location, **_options(source)), found)
    except _ABSENT as error:
        _refuse_blind(source, TrOCRProcessor, error)
        raise


def _options(source: Source) -> dict[str, Any]:
    return {"revision": source.revision or "main", "trust_remote_code": source.trusts_code}


def _model_type(source: Source) -> str | None:
    try:
        return load_config(source).model_type
    except ModelError:  # said where the model is asked for
        return None


def _is_empty(processor: Any) -> bool:
    """True for a tokenizer of special tokens alone, as transformers makes one where there are no files."""
    special = getattr(processor, "all_special_ids", None)
    return special is not None and len(processor) <= len(special)


def _asks_for_code(error: Exception) -> bool:
    """True if `error` says that code of the checkpoint would have to run."""
    return "trust_remote_code" in str(error) or "execute custom code" in str(error)


def _refuse_blind(source: Source, full: Any, error: Exception) -> None:
    """Raises ModelError for a model that sees: with its tokenizer alone it would pass for a text model.

    full: its class of processors, if there is one. error: why that cannot be loaded.
    """
    if full is not None and "image_processor" in full.get_attributes():
        raise ModelError(
            f"The processor of {source.id!r}, a {full.__name__}, cannot be loaded ({_first(error)}), and "
            "without it the model reads no images. Put preprocessor_config.json and the files of its "
            "tokenizer into the folder."
        ) from error


def _refuse_broken(source: Source, error: Exception) -> None:
    """Raises ModelError if the folder of `source` holds files of a tokenizer, which `error` then is about."""
    found = [x for x in _TOKENIZER_FILES if (Path(source.location) / x).exists()]
    if found:
        raise ModelError(
            f"The tokenizer of {source.id!r} ({', '.join(found)}) cannot be loaded: {_first(error)}. Copy "
            "its files again."
        ) from error


def _processor_class(source: Source) -> Any:
    """transformers' processor class for the config of `source`; None if it has none."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        return PROCESSOR_MAPPING.get(type(load_config(source)), None)
    except ModelError:
        return None


def _first(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return shortened(said, SAID).rstrip(".")


def _without_video(source: Source, options: dict[str, Any]) -> Any:
    """The processor of `source` without its video half, for machines without torchvision, and without sound.

    Qwen2-VL's processor insists on a video processor, which needs torchvision; images alone do not. Its other
    arguments are those of processor_config.json.
    Can go when transformers ships a video processor on Pillow, as it does for images.
    """
    from transformers import AutoTokenizer, ProcessorMixin

    # Not from the top: without torchvision 5.17 has nothing but a message there.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    full = _processor_class(source)

    def check(self: Any, name: str, argument: Any) -> Any:
        is_left_out = argument is None and name not in ("tokenizer", "image_processor")
        return None if is_left_out else full.check_argument_for_proper_class(self, name, argument)

    # SmolVLM's own way of rendering asks its video half for a number of frames.
    changed = {
        "check_argument_for_proper_class": check,
        "apply_chat_template": ProcessorMixin.apply_chat_template,
    }
    images_only: Any = type(full.__name__, (full,), changed)
    tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
    images = AutoImageProcessor.from_pretrained(source.location, **options)
    parts = {"tokenizer": tokenizer, "image_processor": images}
    given, _ = full.get_processor_dict(source.location, revision=options["revision"])
    given.setdefault("chat_template", tokenizer.chat_template)
    return images_only.from_args_and_dict([parts.get(x) for x in full.get_attributes()], given)


@contextmanager
def _never_asking() -> Iterator[None]:
    """While open, transformers refuses code of a checkpoint where it would ask on the terminal.

    Some of its processors load their parts without handing on `trust_remote_code`.
    """
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds
