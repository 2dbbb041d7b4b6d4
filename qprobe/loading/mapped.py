"""Weights that lie in files and are mapped into memory, and letting go of the pages that were read.

safetensors maps the files of a checkpoint, so that a weight takes memory from when it is first read. Such
pages count as the process's own until the system wants them back; `Mapped.forget` gives them back at once.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qprobe.errors import RunError

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's mallopt
_DONTNEED = 4  # MADV_DONTNEED of Linux: on a private mapping of a file, pages are read from it again


class Mapped:
    """The files that are mapped into this process when it is made, and those that `keep` adds.

    folder: where `keep` writes files without a name, so that nothing is left there, also after a kill.
    Elsewhere than on Linux nothing is known to be mapped: `keep` and `forget` still work, but save nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._regions = _file_regions()
        self._own: set[int] = set()  # addresses of what `keep` mapped

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor with the values of `tensor` that lies in a file: itself, if it does already.

        Raises RunError if the file cannot be written.
        """
        if self._is_mapped(tensor) or not tensor.numel():
            return tensor
        flat = tensor.detach().contiguous().reshape(-1)
        try:
            # On Linux it never has a name that a kill could leave.
            with tempfile.TemporaryFile(dir=self._folder) as file:
                file.write(flat.view(torch.uint8).numpy().data)
                file.flush()
                name = f"/dev/fd/{file.fileno()}"
                mapped = torch.from_file(name, shared=False, size=flat.numel(), dtype=tensor.dtype)
        except OSError as error:
            raise RunError(
                f"{self._folder} cannot take the weights that wait for their turn: {error.strerror}. "
                "Make room there, or raise --max-memory."
            ) from error
        self._own.add(mapped.data_ptr())
        return mapped.view(tensor.shape)

    def forget(self, tensor: Tensor) -> None:
        """Let go of the memory of `tensor` if it lies in a file, which it is read from again when needed."""
        if not self._is_mapped(tensor):
            return
        page = mmap.PAGESIZE
        start = -(-tensor.data_ptr() // page) * page
        length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _DONTNEED)

    def _is_mapped(self, tensor: Tensor) -> bool:
        # Only where that is certain: memory of no file would come back as zeros.
        if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return first in self._own or any(start <= first and last <= end for start, end in self._regions)


def return_freed_memory() -> None:
    """From now on, let memory of 1 MiB or more go back to the system as soon as it is freed.

    glibc's malloc otherwise comes to keep what was freed, in pieces: several times the size of the weights
    in use where they come and go. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**20)


def _file_regions() -> list[tuple[int, int]]:
    """(start, end) of the addresses where files of data are mapped privately; none but on Linux.

    Whatever their names are: a cache of the hub calls a checkpoint's files by their hashes. A file of which
    some part may be executed is a library, whose data its code may have changed.
    """
    if sys.platform != "linux":
        return []
    found, libraries = [], set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, device, inode, *_ = line.split(maxsplit=5)
        if inode == "0" or not rights.endswith("p"):
            continue
        start, end = (int(x, 16) for x in span.split("-"))
        found.append(((device, inode), start, end))
        if "x" in rights:
            libraries.add((device, inode))
    return [(start, end) for file, start, end in found if file not in libraries]
