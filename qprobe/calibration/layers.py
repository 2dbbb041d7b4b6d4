"""The weights of a model's layers, rounded for what they read."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch

from qprobe.calibration.codes import Readers, Rounded, calibrate_together
from qprobe.calibration.gram import Gram, SharedInput
from qprobe.formats.nf4 import Nf4
from qprobe.measure.subject import Subject

APART = "it does not read the same tensor as its neighbours on every batch"


def rounded_layers(
    subject: Subject, group: Sequence[SharedInput], grams: Sequence[Gram], apart: AbstractSet[str], fmt: Nf4
) -> list[dict[str, Rounded]]:
    """The weights of each shared input of `group`, by layer; those `apart` are left to nearest.

    group: as of `qprobe.calibration.room.rounded_together`; grams: of each.
    """
    names = [[name for name in one.names if name not in apart] for one in group]
    readers = [
        Readers([subject.dequantized.own(name) for name in some], gram.total, gram.tokens)
        for some, gram in zip(names, grams, strict=True)
    ]
    with torch.no_grad():
        found = calibrate_together(readers, fmt)
    return [
        dict.fromkeys(one.names, Rounded(None, why=APART)) | dict(zip(some, rounded, strict=True))
        for one, some, rounded in zip(group, names, found, strict=True)
    ]
