"""A measure that the package does not know: the weight error once more, for each sample of a batch."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qprobe.inputs.batch import Batch
from qprobe.measure.weights import error_sums
from qprobe.registry.measures import Column, Measure, Stage

STAGE = Stage(
    "dummy",
    {"sample": "text", "layer": "text", "n": "count", "signal": "number", "noise": "number"},
    ("sample", "layer"),
)
COLUMN = Column("dummy_nmse", "nmse", "", "nmse", "dummy error", "dummy nmse", "weight error once more")
MEASURE = Measure("dummy", STAGE, (COLUMN,), "tests.registry.dummy:observe")


def observe(subject: Any, measures: Any, batch: Batch) -> dict[str, pd.DataFrame]:
    """One row for each sample and linear."""
    weights = subject.dequantized
    sums = {name: error_sums(weights.own(name), weights.weight(name))[0] for name in weights.modules}
    rows = [(x.id, name, s.n, s.signal, s.noise) for x in batch.samples for name, s in sums.items()]
    return {STAGE.name: pd.DataFrame(rows, columns=list(STAGE.schema))}
