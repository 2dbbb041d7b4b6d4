"""Where an adapter begins: at nothing, or at what calibrated 4-bit leaves of each weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qprobe.calibration.correction import FILE_NAME
from qprobe.checkpoint.ready import is_four_bit
from qprobe.checkpoint.starts.held import adapters_of
from qprobe.errors import ManifestError, RunError
from qprobe.formats.codes_file import sha256_of
from qprobe.manifest.records import Manifest
from qprobe.runs.folder import RunFolder


class Factors:
    """The open file of corrections: for a layer the factors whose product is to be added to its weight.

    rank: the highest one of a layer.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.layers = frozenset(x.removesuffix(".left") for x in file.keys() if x.endswith(".left"))
        self.rank = max((file.get_slice(f"{x}.right").get_shape()[0] for x in self.layers), default=0)

    def of(self, layer: str) -> tuple[Tensor, Tensor]:
        """((out_features, r), (r, in_features)), float32."""
        left, right = (self._file.get_tensor(f"{layer}.{side}") for side in ("left", "right"))
        return left.float(), right.float()


def kept_correction(manifest: Manifest, folder: Path) -> str | None:
    """SHA-256 of the correction that the run of the calibrated weights of `manifest`, which lies in `folder`,
    keeps; None if it keeps none. Also where its file is gone, which `correction_of` refuses.
    """
    if manifest.codes is None:
        return None
    run = (folder / manifest.codes.file).parent
    noted = RunFolder(run).notes.get("correction")
    if noted is None or noted.codes != manifest.codes.sha256:
        return None
    return noted.sha256


@contextmanager
def correction_of(manifest: Manifest, folder: Path) -> Iterator[Factors]:
    """The corrections that belong to the calibrated weights of `manifest`, which lies in `folder`.

    Raises ManifestError if there are none, or they are of other weights or damaged.
    """
    fix = "Scan with --format nf4-calibrated --keep-correction RANK, or begin at zero (--start zero)."
    if manifest.codes is None:
        raise ManifestError(f"A corrected start needs calibrated weights, which the manifest has not. {fix}")
    run = (folder / manifest.codes.file).parent
    path = run / FILE_NAME
    noted = RunFolder(run).notes.get("correction")
    if noted is not None and noted.codes == manifest.codes.sha256 and noted.sha256 is None:
        raise ManifestError(
            "The correction of these calibrated weights was no better than none on the samples that the scan "
            "kept back, so it is not kept. Begin at zero (--start zero)."
        )
    if noted is not None and not path.is_file():
        raise ManifestError(
            f"{path}, which the scan wrote, is missing. Put it back, or begin at zero (--start zero)."
        )
    if noted is None:
        raise ManifestError(f"{run} keeps no correction of its calibrated weights. {fix}")
    if noted.codes != manifest.codes.sha256 or sha256_of(path) != noted.sha256:
        raise ManifestError(f"{path} is damaged, or of other calibrated weights than the manifest. {fix}")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path} cannot be read ({error}). {fix}") from None
        yield Factors(file)


def start_corrected(tuned: Any, factors: Factors, rank: int) -> tuple[str, ...]:
    """Puts the corrections into the adapters of `tuned`, a peft model, behind the first `rank` rows of lora_A
    and columns of lora_B, which begin at zero; the layers that have one.

    The whole adapter of a layer in 16-bit, of which nothing is missing, begins at zero.
    """
    started = []
    for name, layer in adapters_of(tuned).items():
        if name not in factors.layers or not is_four_bit(layer.get_base_layer()):
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        left, right = factors.of(name)
        place = slice(rank, rank + len(right))
        a.data[place] = right.to(a)
        b.data[:, place] = (left / layer.scaling["default"]).to(b)
        started.append(name)
    return tuple(started)
