"""Silence for known remarks of other packages that tell a user of the command line nothing.

Each entry is one remark, with the reason why it may go. All else passes, above all every error and
every warning about a checkpoint that does not fit its model.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Remark:
    """Log lines of `logger` that contain `text`, and why they are left out."""

    logger: str
    text: str
    why: str


REMARKS = (
    Remark(
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward",
        "an optional kernel is not installed; the built-in one computes the same",
    ),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves out `REMARKS` while it lasts, and other packages' progress bars where stderr is no terminal."""
    if not sys.stderr.isatty():
        # Read by huggingface_hub on import, and by transformers through it.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    attached = [(logging.getLogger(r.logger), _without(r.text)) for r in REMARKS]
    for logger, drop in attached:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger, drop in attached:
            logger.removeFilter(drop)


def _without(text: str) -> Callable[[logging.LogRecord], bool]:
    """A logging filter that drops records below ERROR whose message contains `text`."""
    return lambda record: record.levelno >= logging.ERROR or text not in record.getMessage()
