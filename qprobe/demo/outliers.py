"""`demo-outliers`: the demo's weights, re-parameterized so that a few layers carry outlier columns.

Attention is linear in the values. Dividing a row of `v_proj` by a power of two and multiplying the
columns of `o_proj` that read it by the same power changes only exponents, so the bf16 model computes
bit-identical logits. In NF4 each enlarged column sets the scale of its block of 64 and rounds the rest
of the block away. This is planted ground truth for tests, not how training made the demo.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from qprobe.demo.folder import demo_folder
from qprobe.errors import MachineError

WEIGHTS = "model.safetensors"
_NOT_COPIED = {WEIGHTS, "training.json"}  # the training record tells of the demo, not of this model


@dataclass(frozen=True)
class Planting:
    """Outlier columns of one layer.

    layer: whose input columns grow by 2 ** exponent. feeder: the linear whose output rows shrink by it.
    channels: those rows. copies: how many attention heads read one value head of `head_width` channels,
    so how many columns of the layer belong to one channel.
    """

    layer: str
    feeder: str
    channels: tuple[int, ...]
    exponent: int
    copies: int = 1
    head_width: int = 32

    def columns(self) -> list[int]:
        """The layer's input columns that read the channels."""
        return [
            (channel // self.head_width * self.copies + copy) * self.head_width + channel % self.head_width
            for channel in self.channels
            for copy in range(self.copies)
        ]


# Chosen by a sweep over the o_proj and the language model's down_proj of the trained demo, on 48 calibration
# scenes. What a tool must find has to be there whichever way one looks, so each of the four
# - hurts alone: in NF4 without the others it costs 0.09, 0.09, 0.06 and 0.07 nats an answer token, where
#   all 80 other linears together cost 0.0024. Sizes that near to each other let none hide behind another;
# - still adds damage when the others are broken: path attribution gives 0.09, 0.10, 0.07 and 0.04 nats, the
#   next layer 0.0015. A planted self-attention output of language layer 0 came out at -0.02: in the company
#   of layers 1, 3 and 4 its damage undoes some of theirs;
# - can be kept alone: o_proj belongs to no fused group. All four cost 6.3 % more bytes.
# They stand in three towers. Channels: the loudest column of each block of 64 (vision), or the loudest
# channel of each value head (language: three heads read it, two enlarged columns a block). 2 ** 5 makes them
# about 30 times the rest, as the outlier channels of large models are; the vision layer, whose damage the
# later layers smooth out, needs 2 ** 7 to hurt as much. NF4 loses 22.6 points of facts on 400 held-out
# scenes, 0.2 with these four kept; with all exponents lower by one it loses 7, higher by one 52.
_VISION = "model.vision_model.transformer.layers"
_LANGUAGE = "model.language_model.layers"
PLANTED = (
    Planting(
        f"{_VISION}.0.self_attn.o_proj", f"{_VISION}.0.self_attn.v_proj", channels=(41, 95, 157), exponent=7
    ),
    Planting(
        f"{_LANGUAGE}.1.cross_attn.o_proj",
        f"{_LANGUAGE}.1.cross_attn.v_proj",
        channels=(21, 49),
        exponent=5,
        copies=3,
    ),
    Planting(
        f"{_LANGUAGE}.3.cross_attn.o_proj",
        f"{_LANGUAGE}.3.cross_attn.v_proj",
        channels=(3, 52),
        exponent=5,
        copies=3,
    ),
    Planting(
        f"{_LANGUAGE}.4.self_attn.o_proj",
        f"{_LANGUAGE}.4.self_attn.v_proj",
        channels=(28, 43),
        exponent=5,
        copies=3,
    ),
)


def planted_layers() -> tuple[str, ...]:
    """Module names of the layers with planted outlier columns."""
    return tuple(planting.layer for planting in PLANTED)


def plant(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's weights with every planting applied; the given tensors stay as they are."""
    planted = dict(weights)
    for planting in PLANTED:
        feeder, layer = _file_name(planting.feeder), _file_name(planting.layer)
        planted[feeder], planted[layer] = planted[feeder].clone(), planted[layer].clone()
        planted[feeder][list(planting.channels)] *= 2.0**-planting.exponent
        planted[layer][:, planting.columns()] *= 2.0**planting.exponent
    return planted


def _file_name(module: str) -> str:
    """Name in the checkpoint of a module's weight: files keep the order of names of transformers 4."""
    inner = module.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    return f"{inner}.weight"


def write_outliers(folder: Path) -> Path:
    """Writes the model with its processor into `folder`, which `from_pretrained` then loads."""
    source = demo_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.name not in _NOT_COPIED:
            shutil.copyfile(file, folder / file.name)
    save_file(plant(load_file(source / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def outliers_folder() -> Path:
    """The folder of `demo-outliers`, made in the user's cache on first use.

    It holds the demo's weights after an exact re-parameterization: known ground truth for tests, not
    a naturally trained model. The demo's files and the table above make the key, so a new demo makes a
    new folder. Raises MachineError if the cache cannot be written.
    """
    root = _cache_root()
    target = root / f"demo-outliers-{_key(demo_folder())}"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        _write_atomically(root, target)
    except OSError as error:
        raise MachineError(
            f"Cannot write demo-outliers below {root}: {error}. "
            "Set XDG_CACHE_HOME to a folder that you may write to."
        ) from error
    return target


def _write_atomically(root: Path, target: Path) -> None:
    """A reader sees the whole folder or none; of two writers at once the first wins."""
    fresh = Path(tempfile.mkdtemp(prefix=".demo-outliers-", dir=root))
    try:
        os.rename(write_outliers(fresh), target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qprobe"


def _key(source: Path) -> str:
    digest = hashlib.sha256(repr(PLANTED).encode())
    for file in sorted(source.iterdir()):
        if file.is_file():
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
