"""A file of 4-bit weights: for each layer what a bitsandbytes checkpoint holds, as safetensors.

Keys are those of such a checkpoint, with the layer's module name: `NAME.weight` the codes, two per byte, and
`NAME.weight.absmax`, `NAME.weight.quant_map`, `NAME.weight.quant_state.bitsandbytes__nf4` and so on its
quantization state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from qprobe.errors import ManifestError
from qprobe.formats.nf4 import StoredNf4
from qprobe.records import CodesFile
from qprobe.system.background import in_background
from qprobe.system.files import atomic_file, write_atomic
from qprobe.system.foreign import check_foreign, open_foreign
from qprobe.system.headers.tensors import read_tensor_header

FILE_NAME = "nf4-calibrated.safetensors"
_WEIGHT = ".weight"
_AGAIN = "Put the one of the scan back, or scan again."
_UNHASHED = 4  # tensors that may wait for their hash while the next are written


def write_codes(path: Path, layers: Mapping[str, StoredNf4]) -> None:
    """Write the weights of `layers` (by module name) to `path`, whole or not at all. Raises OSError."""
    from safetensors.torch import save

    tensors = {key: t for name, one in layers.items() for key, t in _tensors(name, one).items()}
    write_atomic(path, save({key: t.contiguous().cpu() for key, t in tensors.items()}))


@dataclass(frozen=True)
class _Part:
    """Where one tensor lies. start, nbytes: in the file at `path`; shown: its entry in the file's header."""

    path: Path
    start: int
    nbytes: int
    shown: dict[str, Any]

    @property
    def itemsize(self) -> int:
        return self.nbytes // max(1, prod(self.shown["shape"]))


def join_codes(path: Path, sources: Sequence[Path]) -> CodesFile:
    """`path`, with all tensors of the safetensors files `sources`, written whole or not at all.

    A few tensors are in memory at a time. The bytes are those that safetensors writes of all at once: the
    length of the header, the header, and the tensors, the widest elements first, then by name. Raises
    OSError, and ManifestError if a source is damaged.
    """
    parts = {name: part for source in sources for name, part in _parts(source).items()}
    order = sorted(parts, key=lambda name: (-parts[name].itemsize, name))
    header, end = {}, 0
    for name in order:
        header[name] = {**parts[name].shown, "data_offsets": [end, end + parts[name].nbytes]}
        end += parts[name].nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_file(path) as file, in_background(_UNHASHED) as do:
        for data in chain([len(text).to_bytes(8, "little") + text], (_read(parts[name]) for name in order)):
            do(partial(digest.update, data))
            file.write(data)
    return CodesFile(path.name, digest.hexdigest())


def _parts(source: Path) -> dict[str, _Part]:
    """The tensors of a safetensors file by name; raises ManifestError if it is not whole."""
    fix = "Delete it and run the same command again: only it is measured again."
    with open_foreign(source, ManifestError, fix, None) as file:
        try:
            entries, start = read_tensor_header(file)
        except ValueError as error:
            raise ManifestError(f"{source} is damaged ({error}). {fix}") from None
    return {
        name: _Part(source, start + x.data_offsets[0], x.nbytes, {"dtype": x.dtype, "shape": list(x.shape)})
        for name, x in entries.items()
    }


def _read(part: _Part) -> bytes:
    with open_foreign(part.path, ManifestError, "Run the same command again.", None) as file:
        file.seek(part.start)
        return file.read(part.nbytes)


def _tensors(name: str, stored: StoredNf4) -> dict[str, Tensor]:
    state = stored.state.as_dict(packed=True)
    return {f"{name}{_WEIGHT}": stored.codes, **{f"{name}{_WEIGHT}.{key}": t for key, t in state.items()}}


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of the bytes of `path`. Raises ManifestError if it cannot be read."""
    fix = (
        "Put the file of calibrated weights that the scan wrote into its run folder back: a manifest of "
        "calibrated weights is nothing without it."
    )
    with open_foreign(path, ManifestError, fix, None) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked(codes: CodesFile, folder: Path) -> Path:
    """Where the file `codes` lies, seen from `folder`. Raises ManifestError unless it is there, unchanged."""
    path = folder / codes.file
    found = sha256_of(path)
    if found != codes.sha256:
        raise ManifestError(
            f"{path} has SHA-256 {found[:16]}, not {codes.sha256[:16]}; it is damaged or of another "
            "scan. Put the right file back, or scan again."
        )
    return path


class CodesReader:
    """The layers of an open file of 4-bit weights; see `open_codes`."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self.path = file, path
        keys = set(file.keys())
        # A state key has a dot more; a layer's own name may have any number of them.
        self.layers = frozenset(
            key.removesuffix(_WEIGHT)
            for key in keys
            if key.endswith(_WEIGHT) and any(f"{key}.{part}" in keys for part in ("absmax", "quant_map"))
        )
        self._states: dict[str, list[str]] = {}
        for key in sorted(keys):
            layer, mark, part = key.rpartition(f"{_WEIGHT}.")
            if mark and layer in self.layers:
                self._states.setdefault(layer, []).append(part)

    def raw(self, layer: str) -> tuple[Tensor, dict[str, Tensor]]:
        """(codes, quantization state) of `layer` on the CPU, as `Params4bit.from_prequantized` takes them."""
        if layer not in self.layers:
            raise ManifestError(f"{self.path} holds no calibrated weight of {layer}. It is of another scan.")
        key = f"{layer}{_WEIGHT}"
        state = {part: self._file.get_tensor(f"{key}.{part}") for part in self._states[layer]}
        return self._file.get_tensor(key), state

    def stored(self, layer: str, device: Any) -> StoredNf4:
        """The weight of `layer` on `device`. Raises ManifestError if its quantization state is none."""
        from bitsandbytes.functional import QuantState

        codes, state = self.raw(layer)
        try:
            return StoredNf4(codes.to(device), QuantState.from_dict(state, device=device))
        except (KeyError, ValueError) as error:
            raise ManifestError(
                f"{self.path}: the quantization state of {layer} is damaged ({error}). {_AGAIN}"
            ) from None


@contextmanager
def open_codes(path: Path) -> Iterator[CodesReader]:
    """The layers in `path`, read when they are asked for. Raises ManifestError if it is no such file."""
    from safetensors import SafetensorError, safe_open

    check_foreign(path, ManifestError, _AGAIN, None)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield CodesReader(file, path)
    except (OSError, SafetensorError) as error:
        raise ManifestError(f"{path} is no file of 4-bit weights ({error}). {_AGAIN}") from None
