"""How lines become batches: in this process, or in others that work ahead of the steps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qprobe.data.conversation import Conversation
from qprobe.data.reasons import Refused
from qprobe.errors import QprobeError, RunError, SampleError
from qprobe.inputs.batch import UnreadableError
from qprobe.inputs.decoder import Decoder
from qprobe.inputs.encoding import encode_conversations
from qprobe.options import FinetuneOptions
from qprobe.system.wording import is_or_are

# On an H200 a line of 4 tiles takes 0.096 s to become a batch, its step at full size 1 s: reports/training.
WORKERS = 2
AHEAD = 2  # batches that each of them has ready: torch's own default
SHARED_BYTES = 64 * 2**20  # of shared memory for each line that is ready; 4 tiles of 560 pixels take 8 MiB
_SHARED = Path("/dev/shm")
_PARALLEL = "TOKENIZERS_PARALLELISM"
_CAUGHT, _RAISED = "in DataLoader worker process", "DataLoader worker (pid"
"""In what torch raises where a worker raised, and where it was killed."""


@dataclass(frozen=True)
class Collate:
    """A collator that other processes take: conversations in, inputs with labels out, on the CPU.

    Raises SampleError for what cannot be read.
    """

    processor: Any
    dtype: torch.dtype
    decoder: Decoder | None

    def __call__(self, rows: Sequence[Conversation]) -> dict[str, Tensor]:
        try:
            return encode_conversations(self.processor, rows, self.dtype, self.decoder)
        except UnreadableError as error:  # which torch cannot make again, of a message alone
            raise SampleError(str(error)) from error
        except Refused as reason:
            lines = ", ".join(x.name for x in rows)
            raise SampleError(
                f"A line that was read before training cannot be read any more ({lines}: {reason}). Put its "
                "files back; the same command goes on from the last checkpoint."
            ) from reason


def workers_for(options: FinetuneOptions, lines: Sequence[Conversation], on_cpu: bool, processes: int) -> int:
    """How many processes make batches ahead; 0: the one that trains makes them.

    As `options` say, but at most one per core of each of the `processes` that train; without a word `WORKERS`
    where lines have images and a GPU trains, if cores are left over and shared memory holds what is ready.
    """
    cores = _cores_each(processes)
    if options.workers is not None:
        return min(options.workers, cores)
    if on_cpu or not any(x.seen for x in lines) or not _SHARED.is_dir():
        return 0
    room = shutil.disk_usage(_SHARED).free // processes
    if cores <= WORKERS or room < WORKERS * AHEAD * options.batch_size * SHARED_BYTES:
        return 0
    return WORKERS


def fewer_workers(options: FinetuneOptions, processes: int) -> str | None:
    """That fewer workers are started than `options` ask for; None where that is not so."""
    cores = _cores_each(processes)
    if options.workers is None or options.workers <= cores:
        return None
    return (
        f"--workers {options.workers:,} is more than the cores here serve, so {cores} "
        f"{is_or_are(cores)} started for each process that trains: one per core."
    )


def _cores_each(processes: int) -> int:
    """Cores of this machine for each of `processes`, one at least."""
    is_told = hasattr(os, "sched_getaffinity")  # which cores are ours; not on macOS and Windows
    cores = len(os.sched_getaffinity(0)) if is_told else os.cpu_count() or 1
    return max(1, cores // processes)


@contextmanager
def working_ahead(workers: int) -> Iterator[None]:
    """While open, `workers` may be started, and what they raise is one sentence, as it is without them."""
    if not workers:
        yield
        return
    before = os.environ.get(_PARALLEL)
    # A fork of threads in use could wait forever: tokenizers says so on stderr, unless they are off.
    os.environ.setdefault(_PARALLEL, "false")
    try:
        yield
    except QprobeError as error:
        if _CAUGHT not in str(error):
            raise
        said = str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
        raise type(error)(said) from error
    except RuntimeError as error:
        if _RAISED not in str(error):
            raise
        raise RunError(
            f"A process that makes batches ahead ended ({str(error).splitlines()[0]}). Its memory, shared or "
            "not, may not suffice: pass --workers 0. The same command goes on from the last checkpoint."
        ) from error
    finally:
        if before is None:
            os.environ.pop(_PARALLEL, None)
