"""Ablation: the KL of single layers, measured one at a time. Slow, and an oracle for the sensitivities.

For each layer two models are run: the 16-bit model with this layer alone in 4-bit, and standard 4-bit with
this layer alone in 16-bit. Like the path of the sensitivities they run in float32 where the model is small
enough (`path_dtype`), since the KL of one layer would drown in 16-bit rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from qprobe.errors import QprobeError
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.experts.routing import Product, times
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.kl import read_out
from qprobe.measure.runner import STANDARD, kl_rows
from qprobe.measure.subject import Subject
from qprobe.options import Progress
from qprobe.records import Inventory, Sample, Scan
from qprobe.registry.measures import SENSITIVITY_KL
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import rank_table
from qprobe.runs.units import ablation_stage
from qprobe.selection.derived.ablated import ALONE, KEPT
from qprobe.system.processes import Shard

ALL: Literal["all"] = "all"
Ablated = Literal["all"] | int | tuple[str, ...]
"""Which layers to ablate: all, so many from the head of the sensitivity ranking, or those named."""


def parse_ablated(text: str) -> Ablated:
    """The layers that `text` asks to ablate.

    Raises QprobeError for a number below 1, and for text that names nothing.
    """
    asked = text.strip()
    if asked == ALL:
        return ALL
    if asked.removeprefix("-").isdecimal():
        if int(asked) < 1:
            raise QprobeError(f"--ablate {asked} measures no layer. Pass 1 or more, or all.")
        return int(asked)
    names = tuple(name.strip() for name in asked.split(",") if name.strip())
    if not names:
        raise QprobeError("--ablate names no layer. Pass all, a number, or names with commas.")
    return names


def check_ablated(asked: Ablated, inventory: Inventory) -> None:
    """Raises QprobeError if `asked` makes no sense for this model."""
    fixed = {x.name: x.fixed for x in inventory.layers}
    for name in asked if isinstance(asked, tuple) else ():
        if name not in fixed:
            raise QprobeError(
                f"--ablate names {name!r}, which is no linear layer of this model. "
                f"Names are those of layers.csv, such as {inventory.layers[0].name}."
            )
        if fixed[name] is not None:
            raise QprobeError(f"--ablate names {name}, which is never in 4-bit ({fixed[name]}). Drop it.")


def ablated_layers(asked: Ablated, scan: Scan, table: pd.DataFrame) -> tuple[str, ...]:
    """The layers to ablate, in execution order; of those that are quantized and ran on the samples.

    table: the layer table of `scan`.
    """
    ran = {x.name for x in scan.inventory.layers if not x.fixed} - set(scan.unmeasured)
    wanted = ran
    if isinstance(asked, int):
        ranked = rank_table(table, SENSITIVITY_KL.score)["layer"].tolist()
        wanted = set([name for name in ranked if name in ran][:asked])
    elif isinstance(asked, tuple):
        wanted = ran & set(asked)
    return tuple(x.name for x in scan.inventory.layers if x.name in wanted)


def measure_ablation(
    subject: Subject,
    run: RunFolder,
    groups: list[tuple[Sample, ...]],
    layers: tuple[str, ...],
    progress: Progress,
    shard: Shard = Shard(),  # noqa: B008  frozen
) -> None:
    """Measure what is missing of `layers` on those of the batches `groups` that are the share of `shard`.

    Two forward passes for each layer and batch, and two per batch for what they are compared with.
    """
    stage = ablation_stage(frozenset(layers))
    missing = shard.own(run.missing_units(stage, len(groups)))
    count = len(shard.own(range(len(groups))))
    done = count - len(missing)
    for unit in missing:
        tick = partial(_tick, progress, done, count)
        frames = subject.measured(
            "ablation", groups[unit], lambda batch, tick=tick: {stage: _unit(subject, batch, layers, tick)}
        )
        run.write_unit(stage, unit, frames[stage])
        done += 1


def _tick(progress: Progress, batches_done: int, batches: int, layers_done: int, layers: int) -> None:
    progress("ablation", batches_done * layers + layers_done, batches * layers)


def _unit(
    subject: Subject, batch: Batch, layers: tuple[str, ...], tick: Callable[[int, int], None]
) -> pd.DataFrame:
    """KL rows of one batch: of standard 4-bit, and of each layer alone in 4-bit and alone in 16-bit."""
    path = subject.path
    batch = batch.in_dtype(path.dtype)
    with walking(path), torch.inference_mode():
        reference = read_out(subject.model, batch)

        def rows(candidate: str, four_bit: frozenset[str]) -> pd.DataFrame:
            return kl_rows(
                batch, candidate, path.readout.sums(reference, _logits_with(subject, batch, four_bit))
            )

        frames = [rows(STANDARD, subject.quantized)]
        for count, name in enumerate(layers, start=1):
            frames.append(rows(ALONE + name, frozenset((name,))))
            frames.append(rows(KEPT + name, subject.quantized - {name}))
            tick(count, len(layers))
    return pd.concat(frames)


def _logits_with(subject: Subject, batch: Batch, four_bit: frozenset[str]) -> list[Tensor]:
    """The answer logits with the linears `four_bit` in 4-bit, in the dtype of the batch."""

    def forward(name: str, product: Product, x: Tensor) -> Tensor:
        return times(product, x, subject.dequantized.weight(name).to(x.dtype))

    chosen = {name: module for name, module in subject.modules.items() if name in four_bit}
    with replaced_forwards(chosen, forward):
        return read_out(subject.model, batch)
