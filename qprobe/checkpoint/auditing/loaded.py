"""The part of `qprobe audit` that loads the checkpoint, as a user would, and looks at every layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from qprobe.checkpoint.auditing.found import AuditedLayer
from qprobe.checkpoint.codes import keep_codes_as_stored
from qprobe.checkpoint.experts.four_bit import as_bitsandbytes, four_bit_experts
from qprobe.checkpoint.experts.packed import load_packed
from qprobe.checkpoint.plain import load_plainly
from qprobe.checkpoint.trial.watch import prove_read
from qprobe.checkpoint.verify import verify
from qprobe.errors import ModelError, VerificationError, is_out_of_memory
from qprobe.loading.device import pick_device
from qprobe.loading.experts.weights import expert_weights
from qprobe.loading.pretrained import incomplete
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import Skeleton
from qprobe.manifest.records import Manifest
from qprobe.system.devices import AskedDevice
from qprobe.system.wording import counted, is_or_are


def loaded_problems(
    skeleton: Skeleton, layers: Sequence[AuditedLayer], manifest: Manifest | None, device: AskedDevice
) -> Iterator[str]:
    """What is wrong with the model that a plain `from_pretrained` of its folder gives; one sentence each.

    Raises MachineError for a device that is not here, and whatever says that its memory does not suffice.
    """
    place = pick_device(device)
    fused = expert_weights(skeleton.model)
    experts = [x.name for x in layers if x.name in fused and x.state == "4-bit"]
    try:
        if experts:
            model = load_packed(skeleton, experts, place)
            as_bitsandbytes(model)
            problems = []
        else:
            model, info = load_plainly(skeleton, place)
            problems = [*incomplete(skeleton.source, model, info)]
    except Exception as error:  # a checkpoint can be wrong in as many ways as there are model classes
        if is_out_of_memory(error):  # says nothing of the checkpoint
            raise
        first = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
        yield f"transformers cannot load the checkpoint: {first}."
        return
    problems += _wrong(model, fused, layers, manifest)
    yield from problems or _unproven(model, skeleton)


def _unproven(model: Any, skeleton: Skeleton) -> Iterator[str]:
    """What one forward of a sample says against the loaded `model`."""
    keep_codes_as_stored(model)
    try:
        prove_read(model.eval(), load_processor(skeleton.source))
    except (VerificationError, ModelError) as error:
        yield str(error)


def _wrong(
    model: Any, fused: Collection[str], layers: Sequence[AuditedLayer], manifest: Manifest | None
) -> Iterator[str]:
    """What of the loaded `model` is not what its files say, or `manifest` does. fused: names of experts."""
    modules, packed = dict(model.named_modules()), four_bit_experts(model)
    problems = [
        (x.name, _problem_of_experts(x.name in packed, x.state))
        if x.name in fused
        else (x.name, _problem(modules.get(x.name), x.state))
        for x in layers
    ]
    wrong = [f"{name} {problem}" for name, problem in problems if problem is not None]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        yield (
            f"{len(wrong)} of {counted(len(layers), 'linear')} {is_or_are(len(wrong))} wrong once loaded: "
            f"{'; '.join(wrong[:3])}{more}."
        )
    elif manifest is not None:
        try:
            verify(model, manifest)
        except VerificationError as error:
            yield str(error)


def _problem_of_experts(is_four_bit: bool, state: str) -> str | None:
    if is_four_bit == (state == "4-bit"):
        return None
    return f"is in {'4' if is_four_bit else '16'}-bit, though its files are {state}"


def _problem(module: Any, state: str) -> str | None:
    """What is wrong with a loaded layer whose files say `state`."""
    if not isinstance(module, nn.Linear):
        return f"is a {type(module).__name__}"
    from bitsandbytes.nn.modules import Linear4bit

    weight: Any = module.weight
    if isinstance(module, Linear4bit):
        if getattr(weight, "quant_state", None) is None:
            return f"is a Linear4bit that holds {str(weight.dtype).removeprefix('torch.')} and no quant_state"
        return None if state == "4-bit" else f"is in 4-bit, though its files are {state}"
    return "is in 16-bit, though its files are packed" if state == "4-bit" else None
