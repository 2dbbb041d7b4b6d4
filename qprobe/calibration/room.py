"""Memory of calibration in bytes: what is set aside for rounding, and how much is rounded at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from qprobe.calibration.codes import workspace_bytes
from qprobe.calibration.gram import SharedInput, gram_bytes
from qprobe.calibration.token_weights import is_two_sided
from qprobe.calibration.two_sided import moving_bytes
from qprobe.measure.memory import free_memory
from qprobe.measure.subject import Subject
from qprobe.system.processes import even_runs

MOST_MEMORY = 4 * 2**30  # by default: more saves few passes, and rounding needs room beside it
MOST_RECORDED = 6 * 2**30  # what blocks of an 11B are called with for 32 images; to fetch it takes longer


def check_limit(subject: Subject) -> None:
    """Raises MachineError if the memory limit has no room for the Gram matrices and rounding of a layer.

    Of fused experts the matrices of all are held at once.
    """
    if subject.limit is None:
        return
    device = subject.reference.device
    needed = {
        x.name: (x.experts or 1) * gram_bytes(x.in_features, device)
        + rounding_bytes(x.out_features, x.in_features)
        + (moving_bytes([x.out_features], x.in_features) if is_two_sided(subject, x.out_features) else 0)
        for x in subject.inventory.layers
        if not x.fixed and not x.transposed
    }
    most = max(needed, key=needed.__getitem__, default=None)
    if most is not None:
        kept = outputs_bytes(subject, (x.out_features for x in subject.inventory.layers if not x.experts))
        subject.limit.check(needed[most] + kept, f"calibrating {most}")


def outputs_bytes(subject: Subject, heights: Iterable[int]) -> int:
    """What the gradients' matrices of weights with so many rows each take where the model is, all together.

    With a memory limit on a GPU they wait on the host.
    """
    if subject.limit is not None and subject.reference.device.type != "cpu":
        return 0
    return sum(4 * height**2 for height in heights if is_two_sided(subject, height))


def rounding_bytes(out_features: int, in_features: int, matrices: int = 1) -> int:
    """What rounding holds at most beside Gram matrices, with the 16-bit weights, which may be streamed."""
    return workspace_bytes(out_features, in_features, matrices) + 2 * out_features * in_features


def gram_room(subject: Subject, inputs: Sequence[SharedInput]) -> int:
    """Bytes for Gram matrices: what a memory limit leaves, or a quarter of what is free, beside rounding.

    The quarter is `MOST_MEMORY` at most; of several devices the fullest one counts. inputs: all there are;
    `shared_inputs` has run. Raises MachineError if the largest matrix does not fit.
    """
    device = subject.reference.device
    rounding = widest_rounding(subject, inputs)
    kept = outputs_bytes(subject, (subject.modules[x].out_features for one in inputs for x in one.names))
    if subject.limit is None:
        free = min(free_memory(place) for place in subject.reference.devices) - kept
        return min(max(0, free) // 4, MOST_MEMORY, max(0, free - rounding))
    # Samples run while matrices are summed, weights are rounded afterwards. A quarter more than the survey,
    # which makes no copies of what layers read.
    beside = max(subject.limit.needed_by("survey") * 5 // 4, rounding) + kept
    largest = max((gram_bytes(one.in_features, device) for one in inputs), default=0)
    subject.limit.check_room(beside + largest, "calibration")
    return subject.limit.left_bytes - beside


def record_room(subject: Subject) -> int:
    """Bytes that what blocks are called with may take on the devices (see `qprobe.calibration.walk`)."""
    if subject.limit is not None:
        return 0
    return min(MOST_RECORDED, min(free_memory(place) for place in subject.reference.devices) // 4)


def widest_rounding(subject: Subject, inputs: Iterable[SharedInput]) -> int:
    """What rounding takes for the one of `inputs` that takes most, see `rounding_bytes`."""
    return max((_rounding(subject, [one]) for one in inputs), default=0)


def rounded_together(
    subject: Subject, inputs: Sequence[SharedInput], limit_bytes: int
) -> list[list[SharedInput]]:
    """`inputs` in groups that are rounded at once, as large as fit, in the order of their first members.

    Members have as many in_features and one device. limit_bytes: what a group may take beside their Gram
    matrices and the widest of `inputs` alone. On a CPU each is alone: nothing waits for small steps there.
    """
    most = widest_rounding(subject, inputs) + limit_bytes - _held(subject, inputs)
    groups: list[list[SharedInput]] = []
    alike: dict[tuple[int, torch.device], list[SharedInput]] = {}
    for one in inputs:
        device = subject.device_of(one.leader)
        last = alike.get((one.in_features, device), [])
        if last and device.type != "cpu" and _rounding(subject, [*last, one]) <= most:
            last.append(one)
            continue
        groups.append([one])
        alike[one.in_features, device] = groups[-1]
    return groups


def shares(subject: Subject, inputs: Sequence[SharedInput], world: int) -> list[range]:
    """The numbers of `inputs` in `world` runs that take about as long to round, by matrix products."""
    rows = [sum(subject.modules[name].out_features for name in one.names) for one in inputs]
    costs = [count * one.in_features**2 for count, one in zip(rows, inputs, strict=True)]
    return even_runs(costs, world)


def _held(subject: Subject, inputs: Iterable[SharedInput]) -> int:
    return sum(gram_bytes(one.in_features, subject.device_of(one.leader)) for one in inputs)


def _rounding(subject: Subject, inputs: Sequence[SharedInput]) -> int:
    """`rounding_bytes` of `inputs` at once, and what it takes to move their codes."""
    heights = [subject.modules[name].out_features for one in inputs for name in one.names]
    moving = [height for height in heights if is_two_sided(subject, height)]
    columns = inputs[0].in_features
    return rounding_bytes(sum(heights), columns, len(inputs)) + moving_bytes(moving, columns)
