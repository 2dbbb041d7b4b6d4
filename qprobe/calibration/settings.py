"""How codes are chosen: what decides them beside weights and samples, and how many samples that takes."""

from __future__ import annotations

import torch
from torch import nn

from qprobe.calibration.gptq import DAMPING
from qprobe.calibration.token_weights import MIX, draws
from qprobe.calibration.work import Groups
from qprobe.measure.attribution import path_dtype
from qprobe.measure.subject import Subject
from qprobe.runs.key import Rounding
from qprobe.system.wording import counted

VERSION = 12
"""Of what decides the codes, beside weights and samples.

Version 12 tunes scales of large models on two samples at a time. Version 11 decides whether tokens are
weighed before it has seen gradients of the samples kept back. Version 10 moves codes of small models under
the Gram matrix of the outputs' gradients as well. Version 9 decides with layers that calibration leaves out
rounded to nearest, 8 calibrates fused experts, 7 keeps back every eighth sample, however they are batched,
and 6 holds outputs of encoders to the damage that the scan measures. Version 5 decides on samples kept back
whether tokens are weighed, 4 weighs them and tunes scales, 3 leaves out image tiles that no text attends
to, 2 shrinks the Gram matrices.
"""


def settings(subject: Subject, tune_steps: int = 0, drawn_texts: int = 0) -> Rounding:
    """What decides the codes; part of a run's key."""
    tokens = f"{MIX:g} by squared gradients, {counted(draws(subject), 'draw')}"
    method = "gptq, two-sided" if subject.path.dtype == torch.float32 else "gptq"
    return Rounding(method, VERSION, DAMPING, "n / (n + tokens)", tokens, tune_steps, drawn_texts)


MORE_SAMPLES = 128  # on SmolLM2 512 texts leave 0.138, 128 texts 0.143, 32 a ninth more


def fitted(
    measured: Groups, more: Groups, held_out: Groups, asked: int | None = None, drawn_texts: int = 0
) -> str:
    """What a reader is told of what codes are fitted to: the samples `measured`, `more`, and drawn texts.

    held_out: samples to which none are. asked: how many samples were asked for, None for no number.
    """
    own, others, spared = (sum(len(group) for group in groups) for groups in (measured, more, held_out))
    also = f", which are {own} of the {counted(own + others, 'sample')} that" if others else " that"
    told = [
        f"Sensitivities and activation errors are measured on samples{also} the codes were fitted to, so "
        "they are lower than on others."
    ]
    if asked is not None and asked < own:
        told.append(
            f"Codes are fitted to all {own:,} samples that are measured, more than the {asked:,} asked for."
        )
    if asked is not None and own + others < asked:
        told.append(f"Of the {counted(asked, 'sample')} asked for, codes were fitted to {own + others:,}.")
    if spared:
        told.append("No code was fitted to the held-out samples.")
    if drawn_texts:
        told.append(
            f"Codes were fitted to {counted(drawn_texts, 'text')} that the model drew itself as well."
        )
    return " ".join(told)


def samples_wanted(model: nn.Module, device: torch.device, asked: int | None) -> int:
    """How many samples codes are fitted to, as `asked` or as suits device and model; 0: the measured ones.

    model: may be on the meta device.
    """
    if asked is not None or device.type != "cuda":
        return asked or 0
    return MORE_SAMPLES if path_dtype(model) == torch.float32 else 0
