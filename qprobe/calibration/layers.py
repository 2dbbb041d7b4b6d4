"""The weights of a model's layers, rounded for what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qprobe.calibration.codes import Readers, Rounded, calibrate_together
from qprobe.calibration.gram import Gram, SharedInput
from qprobe.formats.nf4 import Nf4
from qprobe.measure.subject import Subject


def rounded_layers(
    subject: Subject,
    group: Sequence[SharedInput],
    grams: Sequence[Gram],
    apart: Mapping[str, str],
    fmt: Nf4,
    outputs: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Rounded]]:
    """The weights of each shared input of `group`, by layer; those `apart` are left to nearest.

    group: as of `qprobe.calibration.room.rounded_together`; grams: of each. apart: why, by name.
    outputs: Gram matrices of the gradients at outputs, by name; None for none.
    """
    names = [[name for name in one.names if name not in apart] for one in group]
    readers = [
        Readers(
            [subject.dequantized.own(name) for name in some],
            gram.total,
            gram.tokens,
            [outputs.get(name) for name in some] if outputs else (),
        )
        for some, gram in zip(names, grams, strict=True)
        if some
    ]
    with torch.no_grad():
        found = iter(calibrate_together(readers, fmt) if readers else [])
    return [
        {name: Rounded(None, why=apart.get(name, "")) for name in one.names}
        | (dict(zip(some, next(found), strict=True)) if some else {})
        for one, some in zip(group, names, strict=True)
    ]
