"""What stops a run that was begun: a full disk, memory that does not suffice, a loss that is no number."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from qprobe.checkpoint.adapters.record import read_record, write_record
from qprobe.errors import RunError, is_out_of_memory
from qprobe.options import FinetuneOptions
from qprobe.training.trainer import LossError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")
"""In what torch raises where its zip writer meets a full disk: a RuntimeError of C++, without an errno."""


@contextmanager
def disk_explained(out: Path) -> Iterator[None]:
    """Turns what a full disk raises into one sentence."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_of_the_disk(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(
            f"{out} cannot be written ({reason}). Make room; the same command goes on from the last "
            "checkpoint."
        ) from error


def _is_of_the_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK
    return isinstance(error, SafetensorError) or any(x in str(error) for x in _TORCH_WRITER)


@contextmanager
def loss_explained(out: Path) -> Iterator[None]:
    """Notes in the record where the loss became no number, so that the folder serves for another try."""
    try:
        yield
    except LossError:
        record = read_record(out)
        assert record is not None
        write_record(out, replace(record, status="diverged"))
        raise


def in_smaller_batches(
    options: FinetuneOptions, tuned: Any, train: Callable[[FinetuneOptions], dict[str, Any]]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(what `train` gives, a sentence if memory did not suffice for the batches that were asked for).

    Where memory runs out, the adapter of `tuned` is put back, and `train` runs again with half the batch, or
    the largest part that divides it, and more of them to a step: each step sees the same lines. It goes on
    from a checkpoint if there is one. Raises what `train` does where one line is too much already.
    """
    trained = {name: x for name, x in tuned.named_parameters() if x.requires_grad}
    before = {name: x.detach().to("cpu", copy=True) for name, x in trained.items()}
    asked = options
    while True:
        try:
            result = train(asked)
        except Exception as error:
            if not is_out_of_memory(error) or asked.batch_size == 1:
                raise
        else:
            return result, () if asked is options else (_said(options, asked),)
        # Outside of the handler: the traceback holds what the batch computed.
        asked = _smaller(asked)
        gc.collect()
        torch.cuda.empty_cache()
        with torch.no_grad():
            for name, x in trained.items():
                x.grad = None
                x.copy_(before[name])


def _smaller(asked: FinetuneOptions) -> FinetuneOptions:
    size = next(n for n in range(asked.batch_size // 2, 0, -1) if asked.batch_size % n == 0)
    return replace(asked, batch_size=size, accumulation=asked.accumulation * asked.batch_size // size)


def _said(options: FinetuneOptions, asked: FinetuneOptions) -> str:
    return (
        f"Memory did not suffice for --batch-size {options.batch_size}, so {asked.batch_size} ran at once, "
        f"and {asked.accumulation} batches made a step of the same lines."
    )
