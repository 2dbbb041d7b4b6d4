"""The rows of a stage's finished units by layer, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from qprobe.errors import RunError
from qprobe.runs.measured import Measured

Rows = Mapping[str, np.ndarray]
"""The rows of one layer: a stage's columns, numbers as `numbers` gives them and texts as objects."""


def rows_by_layer(run: Measured, stage: str) -> dict[str, Rows]:
    """The units of `stage` by layer name; rows keep their order.

    Columns are turned into arrays once and not for each of hundreds of layers, which takes pandas seconds.
    Raises RunError if a layer is none of the run's inventory.
    """
    frame = run.units(stage)
    unknown = sorted(set(frame["layer"]) - {x.name for x in run.key.inventory.layers})
    if unknown:
        raise RunError(
            f"{run.path} holds {stage} units of {unknown[0]}, which scan.json does not list: they belong to "
            "another scan. Scan again with another --out."
        )
    columns = {str(name): _array(frame, str(name)) for name in frame.columns}
    places = frame.groupby("layer", sort=False).indices
    return {
        str(layer): {name: array[rows] for name, array in columns.items()} for layer, rows in places.items()
    }


def numbers(rows: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64, NaN where it is empty; counts are exact up to 2**53."""
    values = rows[column]
    if values.dtype == np.float64:  # which is NaN where it is empty, and need not be searched for that
        return values.to_numpy()
    return values.to_numpy(dtype=np.float64, na_value=nan)


def _array(frame: pd.DataFrame, column: str) -> np.ndarray:
    return numbers(frame, column) if is_numeric_dtype(frame[column]) else frame[column].to_numpy(object)
