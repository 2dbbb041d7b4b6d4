"""The fused weights of a model, calibrated as many at once as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from qprobe.calibration.codes import Rounded
from qprobe.calibration.experts.gram import at_once, gathered_experts
from qprobe.calibration.experts.rounding import RoundedExperts, rounded_experts, why_not
from qprobe.formats.nf4 import Nf4
from qprobe.inputs.batch import Batch
from qprobe.measure.subject import Subject


def fused_experts(subject: Subject) -> list[str]:
    """The fused weights of experts that are quantized, in the order of the inventory."""
    return [x.name for x in subject.inventory.layers if x.experts and not x.fixed]


def rounded_in_turn(
    subject: Subject,
    names: Sequence[str],
    batches: Callable[[], Iterable[Batch]],
    count: int,
    fmt: Nf4,
    limit_bytes: int,
    steps: Callable[[int], Callable[[], None]],
) -> Iterator[tuple[str, RoundedExperts]]:
    """Each of the fused weights `names` after calibration.

    batches: gives the samples in `count` batches, each time from the first. limit_bytes: for matrices at
    once, and again for rounding. steps: of a total, gives what is called after each step.
    """
    whys = {name: why_not(subject.layers[name], fmt.blocksize) for name in names}
    for name, why in whys.items():
        if why is not None:
            yield name, RoundedExperts(Rounded(None, why=why), subject.layers[name].experts or 0, 0)
    parts = list(at_once(subject, [name for name, why in whys.items() if why is None], limit_bytes))
    step = steps(len(parts) * count)
    for part in parts:
        grams = gathered_experts(subject, part, batches(), step)
        for name in part:
            with subject.running(f"round {name}"):
                found = rounded_experts(subject, name, grams.pop(name), fmt, limit_bytes)
            yield name, found
