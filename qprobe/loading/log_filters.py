"""The log filters of `qprobe.system.log_filters` around what loads models in a process that is not ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qprobe.system.log_filters import NO_BARS, Remark, without_remarks


@contextmanager
def quiet_models(*more: Remark) -> Iterator[None]:
    """The same for a function that loads models in a process that is not ours: afterwards all is as before.

    more: remarks to leave out as well. Serves as a decorator. Where HF_HUB_DISABLE_PROGRESS_BARS is set,
    bars stay as it says.
    """
    from transformers.utils import logging as transformers_logging

    hides = not sys.stderr.isatty() and NO_BARS not in os.environ
    hides = hides and transformers_logging.is_progress_bar_enabled()
    if hides:
        transformers_logging.disable_progress_bar()
    try:
        with without_remarks(*more):
            yield
    finally:
        if hides:
            transformers_logging.enable_progress_bar()
