"""The first run of a model: what transformers itself cannot run is said in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import __version__ as transformers_version

from qprobe.errors import ModelError, QprobeError, is_out_of_memory

_ADVICE = "Pass another --dtype, or --measures weight, which runs no sample."


@contextmanager
def failure_explained(model: Any, work: str = "run a sample", advice: str = _ADVICE) -> Iterator[None]:
    """Raises ModelError for what `model` raises while open, unless memory ran out.

    work: what it was to do. advice: a sentence on what to do where it cannot.
    """
    try:
        yield
    except Exception as error:  # a model can fail in as many ways as there are classes
        if isinstance(error, QprobeError) or is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
        raise ModelError(
            f"{type(model).__name__}, as transformers {transformers_version} loads it, does not {work} "
            f"({said}). {advice}"
        ) from error
