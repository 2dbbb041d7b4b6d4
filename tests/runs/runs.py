"""Run folders and inventories made by hand, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from qprobe.records import FormatSpec, Inventory, Linear, ModelIdentity, Scan, Uncovered
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import VERSION, Key, Measures, SampleKey, Spec
from qprobe.runs.units import unit_columns
from qprobe.system.versions import library_versions

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
    return Scan(**{"model": MODEL, "format": FormatSpec(), "inventory": inventory, **changes})


def spec_of(**changes: Any) -> Spec:
    """Two samples in a batch, of which the outputs are measured."""
    batch = tuple(SampleKey(name, f"{name}1", True) for name in "ab")
    measured: dict[str, Any] = {"measures": Measures(False, False), "calibration": (batch,), "seed": 0}
    return Spec("weights", "cpu", **{**measured, "versions": library_versions(), **changes})


def key_of(inventory: Inventory, **changes: Any) -> Key:
    return replace(Key(VERSION, MODEL, FormatSpec(), inventory, spec_of()), **changes)


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
    return pd.DataFrame(list(values), columns=unit_columns(stage))


def output(sample: str, layer: str, signal: float, noise: float, peak: float = 1.0, **changes: Any) -> dict:
    """One row of the stage "outputs", 2 tokens of 4 features, propagated not measured."""
    return {
        "sample": sample, "layer": layer, "expert": None, "tokens": 2, "activation_n": 8,
        "activation_signal": signal, "activation_noise": noise, "activation_nonfinite": 0,
        "activation_peak": peak, "peak_token": 0, "peak_kind": "text", "propagated_n": None,
        "propagated_signal": None, "propagated_noise": None, "propagated_nonfinite": None,
        "propagated_rerouted": None, **changes,
    }  # fmt: skip


def make_run(folder: Path, inventory: Inventory | None = None, **units: list[pd.DataFrame]) -> Path:
    """A run folder whose stages hold the given frames as units 0, 1, ..."""
    run = RunFolder(folder)
    run.open(key_of(inventory or four_layers()))
    for stage, frames in units.items():
        for unit, frame in enumerate(frames):
            run.write_unit(stage, unit, frame)
    return folder
