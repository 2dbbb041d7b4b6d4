"""What a fine-tuning run is refused for before a model is read."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from qprobe.checkpoint.starts.attached import AskedAdapter, check_asked, has_four_bit
from qprobe.checkpoint.starts.corrected import kept_correction
from qprobe.errors import ModelError, QprobeError
from qprobe.manifest.records import Manifest
from qprobe.measure.kl import ANSWERS, readout_of, refuse_unread
from qprobe.options import FinetuneOptions


def with_start(options: FinetuneOptions, manifest: Manifest, folder: Path) -> FinetuneOptions:
    """`options` with the start that they leave open: the correction, if the base has calibrated weights whose
    run keeps one and an adapter goes on a layer in 4-bit, else zero. folder: where the manifest lies.
    """
    if options.start is not None:
        return options
    corrected = replace(options, start="corrected")
    is_kept = options.base == "dynamic" and kept_correction(manifest, folder) is not None
    if is_kept and has_four_bit(asked_adapter(corrected), manifest):
        return corrected
    return replace(options, start="zero")


def check_options(options: FinetuneOptions, manifest: Manifest, folder: Path) -> None:
    """Raises QprobeError for numbers that no run can be made of. options: as of `with_start`; folder: where
    the manifest lies.
    """
    for name, value in (("epochs", options.epochs), ("learning-rate", options.learning_rate)):
        if not (isfinite(value) and value > 0):
            raise QprobeError(f"--{name} {value:g} makes no training. Pass a number above 0.")
    if not 0 <= options.held_out < 1:
        raise QprobeError(f"--held-out {options.held_out:g} is no share. Pass 0 or more, and less than 1.")
    counts = {
        "batch-size": options.batch_size,
        "accumulation": options.accumulation,
        "max-length": options.max_length,
        "save-every": options.save_every,
        "steps": 1 if options.steps is None else options.steps,
    }
    for name, count in counts.items():
        if count < 1:
            raise QprobeError(f"--{name} {count} makes no training. Pass 1 or more.")
    if options.workers is not None and options.workers < 0:
        raise QprobeError(f"--workers {options.workers} is no number of processes. Pass 0 or more.")
    if options.distill < 0 or (options.distill and options.base == "16-bit"):
        raise QprobeError(
            f"--distill {options.distill} on --base {options.base}: a 4-bit base learns to answer as the "
            "16-bit model, in a number of steps. Leave --distill out."
        )
    if options.start == "corrected" and options.base != "dynamic":
        raise QprobeError(
            f"--start corrected repairs what calibrated 4-bit leaves, and --base is {options.base}. "
            "Leave one of them out."
        )
    check_asked(asked_adapter(options), manifest, folder)


def asked_adapter(options: FinetuneOptions) -> AskedAdapter:
    """The adapter that `options`, which name its start, ask for."""
    assert options.start is not None
    return AskedAdapter(options.start, options.rank, options.adapt, options.for_tool)


def refuse_without_answers(model: Any) -> None:
    """Raises ModelError for a model without a loss on the tokens of answers."""
    refuse_unread(model)
    if readout_of(model) != ANSWERS:
        raise ModelError(
            f"{type(model).__name__} gives no answers in tokens, so there is no loss that finetune could "
            "lower. Train it with transformers' own classes; load_dynamic_4bit gives the model."
        )
