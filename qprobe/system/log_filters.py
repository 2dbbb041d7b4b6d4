"""Silence for known remarks of other packages that tell a user nothing.

Each entry is one remark, with the reason why it may go. All else passes, above all every error and
every warning about a checkpoint that does not fit its model.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Remark:
    """Log lines of `logger` that contain `text`, and why they are left out."""

    logger: str
    text: str
    why: str


NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"

REMARKS = (
    Remark(
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward",
        "an optional kernel is not installed; the built-in one computes the same",
    ),
    *(
        Remark(
            f"transformers.models.{name}.video_processing_{name}",
            "does not apply the per-frame pixel cap",
            "the checkpoint's own settings decide, as they do at inference",
        )
        for name in ("qwen2_vl", "qwen3_vl")
    ),
)


# FutureWarnings of transformers on arguments that its own models pass to each other under their old names:
# (message, module in which they seem to arise), regular expressions. They name the caller of `forward`, which
# is torch (its checkpoint, for blocks that run again) or, for weights that are moved about, accelerate; of
# theirs only transformers' wording is left out.
_DEPRECATIONS = (
    ("", r"transformers(\.|$)"),
    (
        r"`\w+` is deprecated .*for `\w+\.forward`",
        r"(torch\.nn\.modules\.module|torch\.utils\.checkpoint|accelerate\.hooks)$",
    ),
    # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
    (r"`is_gradient_checkpointing` is deprecated", r"peft(\.|$)"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves out `REMARKS` and transformers' deprecations while it lasts.

    Where stderr is no terminal, also other packages' progress bars. Imports none of these packages: for the
    command line, whose process is ours.
    """
    if not sys.stderr.isatty():
        # Read by huggingface_hub on import, and by transformers through it.
        os.environ.setdefault(NO_BARS, "1")
    with without_remarks():
        yield


@contextmanager
def without_remarks(*more: Remark) -> Iterator[None]:
    attached = [(logging.getLogger(r.logger), _without(r.text)) for r in (*REMARKS, *more)]
    for logger, drop in attached:
        logger.addFilter(drop)
    try:
        with warnings.catch_warnings():
            for message, module in _DEPRECATIONS:
                warnings.filterwarnings("ignore", message, FutureWarning, module)
            yield
    finally:
        for logger, drop in attached:
            logger.removeFilter(drop)


def _without(text: str) -> Callable[[logging.LogRecord], bool]:
    """A logging filter that drops records below ERROR whose message contains `text`."""
    return lambda record: record.levelno >= logging.ERROR or text not in record.getMessage()
