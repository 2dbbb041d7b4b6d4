"""Run folders and inventories made by hand, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qprobe.records import FormatSpec, Inventory, Linear, ModelIdentity, Scan, Uncovered
from qprobe.runs.store import UNIT_SCHEMAS, open_run, write_unit

MODEL = ModelIdentity("demo", None, "DemoForConditionalGeneration", "f" * 64)


def linear(name: str, group: str | None = None, shape: tuple[int, int] = (64, 64), **changes: Any) -> Linear:
    """A linear with the true bytes of its shape in NF4 with double quantization."""
    n = shape[0] * shape[1]
    blocks = -(-n // 64)
    sizes = {"bytes_4bit": -(-n // 2) + blocks + 4 * -(-blocks // 256), "bytes_16bit": 2 * n}
    return Linear(name, name, "language", group or name, shape, **{**sizes, **changes})


def inventory_of(*layers: Linear, other_bytes: int = 1000) -> Inventory:
    return Inventory(layers, (), other_bytes)


def scan_of(inventory: Inventory, **changes: Any) -> Scan:
    spec = {"seed": 0, "samples": [{"id": "a", "digest": "a1"}, {"id": "b", "digest": "b1"}]}
    return Scan(**{"model": MODEL, "format": FormatSpec(), "inventory": inventory, "spec": spec, **changes})


def four_layers() -> Inventory:
    """Two free layers, a group of two, and lm_head; one uncovered convolution."""
    return Inventory(
        (
            linear("model.a"),
            linear("model.q", group="qk"),
            linear("model.k", group="qk"),
            linear("model.b", shape=(64, 128)),
            linear("lm_head", fixed="lm_head"),
        ),
        (Uncovered("model.patch.weight", 500, "a convolution"),),
        1000,
    )


def rows(stage: str, *values: Sequence[Any]) -> pd.DataFrame:
    """A unit frame from tuples in the order of the stage's schema."""
    return pd.DataFrame(list(values), columns=list(UNIT_SCHEMAS[stage]))


def output(sample: str, layer: str, signal: float, noise: float, peak: float = 1.0, **changes: Any) -> dict:
    """One row of the stage "outputs", 2 tokens of 4 features, propagated not measured."""
    return {
        "sample": sample, "layer": layer, "tokens": 2, "activation_n": 8, "activation_signal": signal,
        "activation_noise": noise, "activation_nonfinite": 0, "activation_peak": peak, "peak_token": 0,
        "peak_kind": "text", "propagated_n": None, "propagated_signal": None, "propagated_noise": None,
        "propagated_nonfinite": None, **changes,
    }  # fmt: skip


def make_run(folder: Path, inventory: Inventory | None = None, **units: list[pd.DataFrame]) -> Path:
    """A run folder whose stages hold the given frames as units 0, 1, ..."""
    open_run(folder, scan_of(inventory or four_layers()))
    for stage, frames in units.items():
        for unit, frame in enumerate(frames):
            write_unit(folder, stage, unit, frame)
    return folder
