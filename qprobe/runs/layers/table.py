"""The layer table: what was measured, one row per linear, from the finished units of a run.

Its columns are those that `qprobe.registry.measures` declares, between what a layer is and what it saw; how
each follows from the rows is in `qprobe.runs.layers.aggregates`. What was not measured is empty (NaN or
NA), and never 0.
"""

from __future__ import annotations

import csv
from io import StringIO
from math import fsum, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qprobe.errors import QprobeError, RunError
from qprobe.records import Inventory, Linear
from qprobe.registry import measures
from qprobe.runs.derived import csv_bytes
from qprobe.runs.layers.aggregates import LayerRows, aggregated, pooled
from qprobe.runs.layers.rows import Rows, numbers, rows_by_layer
from qprobe.runs.measured import Measured
from qprobe.system.wording import shortened

FILE = "layers.csv"
EXPERTS_FILE = "experts.csv"
PEAKS = "peaks.csv"

ROUNDING = "rounding"
"""Of calibrated weights: "calibrated", of experts with how many are not, "nearest: " and why, or "" if fixed;
empty in other runs."""

# Before the columns of the measures, and after them.
_FIRST = {
    "layer": "str", "tower": "str", "group": "str",
    "in_features": "int64", "out_features": "int64", "experts": "Int64",
    "bytes_4bit": "int64", "bytes_16bit": "int64",
}  # fmt: skip
_LAST = {ROUNDING: "str", "samples": "Int64", "tokens": "Int64"}

STANDARD = "standard"
"""The candidate, in units of the stage "kl", that keeps nothing: standard 4-bit."""

_PEAK_DTYPES = {
    "layer": "str",
    "activation_peak": "float64",
    "sample": "str",
    "token": "Int64",
    "kind": "str",
}


def dtypes() -> dict[str, str]:
    """The columns of layers.csv in their order, each with its pandas dtype."""
    names = [name for x in measures.columns() for name in (x.name, x.error_name) if name is not None]
    return {**_FIRST, **dict.fromkeys(names, "float64"), **_LAST}


def derived_table(run: Measured) -> pd.DataFrame:
    """The layer table of `run`, from its units, columns as `dtypes`, in execution order.

    nmse is noise / signal and sqnr_db its decibels; peaks are maxima over samples; sensitivity_kl and
    isolated_kl (the KL with this layer alone in 4-bit, to second order) are in nats per answer token with the
    standard error of `ratio_se`; samples and tokens count what the layer saw. Of calibrated weights,
    sensitivities and activation errors are on the samples that the codes were fitted to, and so lower than on
    others.
    Raises RunError if the folder is no run or a file of it is damaged.
    """
    names = dict.fromkeys([*(x.stage.name for x in measures.DECLARED), measures.CALIBRATION.name])
    found = {name: rows_by_layer(run, name) for name in names}
    tokens = {name: answer_tokens(run.units(name)) for name in names}
    calibration = found[measures.CALIBRATION.name] if run.key.format.is_calibrated else None
    rows = []
    for layer in run.measured_inventory.layers:
        cells = _static(layer)
        for measure in measures.DECLARED:
            own = found[measure.stage.name].get(layer.name)
            if own is not None:
                layer_rows = LayerRows(own, tokens[measure.stage.name])
                cells |= {k: v for x in measure.columns for k, v in aggregated(x, layer_rows).items()}
        cells |= _counts(found["outputs"].get(layer.name))
        cells[ROUNDING] = "" if calibration is None else _rounding(layer, calibration.get(layer.name))
        rows.append(cells)
    kinds = dtypes()
    return pd.DataFrame(rows, columns=pd.Index(list(kinds))).astype(kinds)


def peaks(run: Measured) -> pd.DataFrame:
    """Where the largest single-token error of each linear was, in execution order.

    Columns: layer, activation_peak (as in the layer table), sample, token (its index in the sequence of its
    kind), kind ("vision", "text" or "answer"); empty for a linear that was not measured. Of equal peaks the
    first by sample id, then token, is named.
    """
    outputs = rows_by_layer(run, "outputs")
    layers = run.measured_inventory.layers
    rows = [{"layer": x.name, **(_peak(outputs.get(x.name)) or {})} for x in layers]
    return pd.DataFrame(rows, columns=pd.Index(list(_PEAK_DTYPES))).astype(_PEAK_DTYPES)


def experts(run: Measured) -> pd.DataFrame:
    """Each expert of each fused weight, in execution order; no rows for a model without.

    Columns: layer, expert (from 0), weight_nmse, activation_nmse on the tokens that were routed to it,
    tokens: how many those are, and rerouted: how many of them go elsewhere with every layer in 4-bit, so that
    the propagated error of the layer leaves them out. What was not measured is empty, as is the
    activation_nmse of 0 tokens.
    """
    weights, outputs = rows_by_layer(run, "weights"), rows_by_layer(run, "outputs")
    rows = []
    for layer in run.measured_inventory.layers:
        for expert in range(layer.experts or 0):
            weight, output = (_of_expert(x.get(layer.name), expert) for x in (weights, outputs))
            rows.append(
                {
                    "layer": layer.name,
                    "expert": expert,
                    "weight_nmse": nan if weight is None else pooled(weight, "").nmse,
                    "activation_nmse": nan if output is None else pooled(output, "activation_").nmse,
                    "tokens": None if output is None else int(output["tokens"].sum()),
                    "rerouted": None if output is None else rerouted(output),
                }
            )
    kinds = {"layer": "str", "expert": "int64", "weight_nmse": "float64"}
    kinds |= {"activation_nmse": "float64", "tokens": "Int64", "rerouted": "Int64"}
    return pd.DataFrame(rows, columns=pd.Index(list(kinds))).astype(kinds)


def rerouted(rows: Rows) -> int | None:
    """How many tokens the propagated error of `rows` leaves out; None where it is not measured."""
    counts = rows["propagated_rerouted"]
    return None if np.isnan(counts).all() else int(np.nansum(counts))


def _of_expert(rows: Rows | None, expert: int) -> Rows | None:
    """The rows of one expert; None where the layer has none, or only such as belong to no expert."""
    if rows is None or np.isnan(rows["expert"]).all():
        return None
    is_its = rows["expert"] == expert
    return {name: values[is_its] for name, values in rows.items()}


def write_table(run: Measured) -> Path:
    """Write layers.csv, and peaks.csv and experts.csv beside it, from the units; the path of layers.csv.

    Numbers are written with the fewest digits that read back as the same number.
    """
    frames = {PEAKS: peaks(run), FILE: derived_table(run)}
    by_expert = experts(run)
    frames |= {EXPERTS_FILE: by_expert} if len(by_expert) else {}
    run.files.write({name: (csv_bytes(frame), len(frame)) for name, frame in frames.items()})
    return run.path / FILE


def parse_table(path: Path, data: bytes, inventory: Inventory) -> pd.DataFrame:
    """The layer table in `data`, the bytes of the layers.csv at `path`.

    Raises RunError if it is damaged, or its layers are not those of `inventory`.
    """
    try:
        table = _parse(data.decode("utf-8"))
    except (ValueError, OverflowError, csv.Error) as error:
        raise RunError(f"{path} is damaged ({shortened(str(error), 200)}). Run the scan again.") from None
    if sorted(table["layer"]) != sorted(x.name for x in inventory.layers):
        count = len(inventory.layers)
        raise RunError(f"{path} does not list the {count} layers of scan.json. Run the scan again.")
    return table


def measured(table: pd.DataFrame) -> tuple[str, ...]:
    """The columns that layers can be ranked by and that hold at least one number."""
    return tuple(x.name for x in measures.columns() if _is_measured(table, x.name))


def _is_measured(table: pd.DataFrame, column: str) -> bool:
    return not np.isnan(numbers(table, column)).all()


def check_measure(table: pd.DataFrame, by: str) -> None:
    """Raise QprobeError, naming the measured columns, unless layers can be ranked by the column `by`."""
    if measures.column(by) and _is_measured(table, by):
        return
    names = measured(table)
    what = "was not measured in this run" if measures.column(by) else "is no measure"
    fix = f"Measured are {', '.join(names)}." if names else "Nothing is measured yet: run the scan first."
    raise QprobeError(f"{by!r} {what}, so layers cannot be ranked by it. {fix}")


def rank_table(table: pd.DataFrame, by: str, top: int | None = None) -> pd.DataFrame:
    """The rows of `table` from the most damaged layer to the least, indexed by rank from 1.

    by: a measured column of a measure. Layers without a value come last, equal ones in execution order.
    top: how many rows; None for all.
    Raises QprobeError if `by` is no measured column or `top` is below 1.
    """
    check_measure(table, by)
    if top is not None and top < 1:
        raise QprobeError(f"--top {top} shows no layer. Pass 1 or more.")
    column = measures.column(by)
    assert column is not None, "checked above"
    ranked = table.sort_values(by, ascending=column.better == "higher", kind="stable", na_position="last")
    ranked.index = pd.RangeIndex(1, len(ranked) + 1, name="rank")
    return ranked if top is None else ranked.head(top)


def attribution_residual(run: Measured) -> float | None:
    """(sum of the sensitivities - KL of standard 4-bit) / that KL, on the samples that have both, as a share.

    None where either was not measured or the KL is 0.
    """
    rows = run.units("kl")
    kl = finite_answers(rows.loc[rows["candidate"].to_numpy() == STANDARD])
    parts = run.units("sensitivity")
    by_sample = {str(name): numbers(rows, "kl_sum") for name, rows in parts.groupby("sample")}
    both = [
        (fsum(by_sample[sample]), float(kl_sum))
        for sample, kl_sum in zip(kl["sample"].tolist(), kl["kl_sum"].tolist(), strict=True)
        if sample in by_sample and np.isfinite(by_sample[sample]).all()
    ]
    total = fsum(kl_sum for _, kl_sum in both)
    return (fsum(attributed for attributed, _ in both) - total) / total if total else None


def finite_answers(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a finite kl_sum and with answer tokens, over which a KL per token can be taken."""
    return rows.loc[np.isfinite(numbers(rows, "kl_sum")) & (numbers(rows, "answer_tokens") > 0)]


def answer_tokens(rows: pd.DataFrame) -> dict[str, int]:
    """Answer tokens by sample in `rows` of a stage, where it has any; empty for a stage without answers."""
    if "answer_tokens" not in rows:
        return {}
    found = dict(zip(rows["sample"], rows["answer_tokens"].tolist(), strict=True))
    return {str(sample): int(count) for sample, count in found.items() if count > 0}


def left_out(run: Measured) -> pd.DataFrame:
    """How many non-finite values the sums of each layer leave out; only layers with any.

    Columns: layer, weight (elements), activation, propagated (output elements), sensitivity (samples; those
    of the isolated KL as well), and samples: the ids on which one of them was not finite, "; " between them.
    """
    layers = run.measured_inventory.layers
    weights, outputs, sensitivity, isolated = (
        rows_by_layer(run, stage) for stage in ("weights", "outputs", "sensitivity", "isolated")
    )
    damage = {x.name: _both(sensitivity.get(x.name), isolated.get(x.name)) for x in layers}
    rows = [
        {
            "layer": x.name,
            "weight": _total(weights.get(x.name), "nonfinite"),
            "activation": _total(outputs.get(x.name), "activation_nonfinite"),
            "propagated": _total(outputs.get(x.name), "propagated_nonfinite"),
            "sensitivity": _not_finite(damage[x.name]),
            "samples": "; ".join(_hurt_samples(outputs.get(x.name), damage[x.name])),
        }
        for x in layers
    ]
    counts = ["weight", "activation", "propagated", "sensitivity"]
    frame = pd.DataFrame(rows, columns=pd.Index(["layer", *counts, "samples"]))
    some = frame[counts].to_numpy().sum(axis=1) > 0
    return frame.loc[some].reset_index(drop=True)


def _parse(text: str) -> pd.DataFrame:
    """The table in `text`; ValueError if it lacks columns, has others, or a cell that is no number.

    Not `pd.read_csv`: pandas 2 may read a float off by a bit unless told float_precision="round_trip", and
    pandas 3 warns of that option.
    """
    header, *body = csv.reader(StringIO(text, newline=""))
    kinds = dtypes()
    if header != list(kinds):
        raise ValueError(f"its columns are {', '.join(header)[:100]}")
    found = dict(zip(header, zip(*body, strict=True), strict=True))
    cells = {name: [_cell(kind, value) for value in found.get(name, ())] for name, kind in kinds.items()}
    return pd.DataFrame(cells, columns=pd.Index(list(kinds))).astype(kinds)


def _cell(kind: str, value: str) -> str | float | None:
    if kind == "str":
        return value
    if kind == "int64":
        return int(value)
    if kind == "Int64":
        return int(value) if value else None
    return float(value) if value else nan


def _static(layer: Linear) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "tower": layer.tower,
        "group": layer.group,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "experts": layer.experts,
        "bytes_4bit": layer.bytes_4bit,
        "bytes_16bit": layer.bytes_16bit,
    }


def _counts(outputs: Rows | None) -> dict[str, int | None]:
    """How many samples and tokens the layer saw; experts see a token once for each that it is routed to."""
    if outputs is None:
        return {}
    tokens = outputs["tokens"]
    return {
        "samples": len(set(outputs["sample"][tokens > 0])) or None,
        "tokens": int(np.nansum(tokens)) or None,
    }


def _rounding(layer: Linear, rows: Rows | None) -> str:
    if layer.fixed is not None:
        return ""
    why = "it never ran on these samples" if rows is None else str(rows["why"][0])
    if rows is None or why:
        return f"nearest: {why}"
    count = rows["nearest"][0]
    return f"calibrated, {int(count)} of {layer.experts} experts to nearest" if count > 0 else "calibrated"


def _peak(rows: Rows | None) -> dict[str, Any] | None:
    if rows is None:
        return None
    peak = rows["activation_peak"]
    found = np.flatnonzero(np.isfinite(peak) & (rows["activation_n"] > 0))
    if not len(found):
        return None
    samples, tokens, kinds = (rows[x] for x in ("sample", "peak_token", "peak_kind"))
    best = min(found, key=lambda i: (-peak[i], samples[i], tokens[i]))
    return {
        "activation_peak": float(peak[best]),
        "sample": samples[best],
        "token": int(tokens[best]),
        "kind": kinds[best],
    }


def _total(rows: Rows | None, column: str) -> int:
    return 0 if rows is None else int(np.nansum(rows[column]))


def _both(sensitivity: Rows | None, isolated: Rows | None) -> Rows | None:
    """The rows of both, where there are any."""
    if sensitivity is None or isolated is None:
        return isolated if sensitivity is None else sensitivity
    return {name: np.concatenate([sensitivity[name], isolated[name]]) for name in sensitivity}


def _not_finite(rows: Rows | None) -> int:
    """On how many samples the KL of `rows` is not finite."""
    return 0 if rows is None else len(set(rows["sample"][~np.isfinite(rows["kl_sum"])]))


def _hurt_samples(outputs: Rows | None, sensitivity: Rows | None) -> list[str]:
    """Ids of the samples on which a layer left something out, in their order."""
    names: list[str] = []
    if outputs is not None:
        counts = np.nan_to_num(outputs["activation_nonfinite"])
        counts = counts + np.nan_to_num(outputs["propagated_nonfinite"])
        names += outputs["sample"][counts > 0].tolist()
    if sensitivity is not None:
        names += sensitivity["sample"][~np.isfinite(sensitivity["kl_sum"])].tolist()
    return list(dict.fromkeys(names))
