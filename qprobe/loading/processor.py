"""The processor of a model, or its tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import __version__ as transformers_version

from qprobe.errors import ModelError
from qprobe.loading.config import load_config
from qprobe.loading.source import Source


def load_processor(source: Source) -> Any:
    """The processor of `source`, its tokenizer if it has no processor, None if it has neither.

    Raises ModelError where the running transformers has it with torchvision only.
    """
    try:
        return _processor(source)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        raise ModelError(
            f"The processor of {source.id!r} needs torchvision with transformers {transformers_version}. "
            "Install it with `pip install torchvision`, or a newer transformers."
        ) from error


def _processor(source: Source) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    revision = source.revision or "main"
    try:
        return AutoProcessor.from_pretrained(source.location, revision=revision)
    except ImportError as error:
        if "VideoProcessor" not in str(error):
            raise
        return _without_video(source)
    except (OSError, ValueError, KeyError):
        pass
    try:
        return AutoTokenizer.from_pretrained(source.location, revision=revision)
    except (OSError, ValueError, KeyError):
        return None


def _without_video(source: Source) -> Any:
    """The processor of `source` without its video half, for machines without torchvision.

    Qwen2-VL's processor insists on a video processor, which needs torchvision; images alone do not.
    Can go when transformers ships a video processor on Pillow, as it does for images.
    """
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    full: Any = PROCESSOR_MAPPING[type(load_config(source))]

    def check(self: Any, name: str, argument: Any) -> Any:
        is_missing_video = argument is None and "video" in name
        return None if is_missing_video else full.check_argument_for_proper_class(self, name, argument)

    images_only = type(full.__name__, (full,), {"check_argument_for_proper_class": check})
    revision = source.revision or "main"
    tokenizer = AutoTokenizer.from_pretrained(source.location, revision=revision)
    images = AutoImageProcessor.from_pretrained(source.location, revision=revision)
    return images_only(images, tokenizer, None, chat_template=tokenizer.chat_template)
