"""How sure the sensitivity ranking is: the ranks that other samples of the same kind would have given."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd

from qprobe.errors import RunError
from qprobe.runs.derived import csv_bytes
from qprobe.runs.layers.table import answer_tokens
from qprobe.runs.measured import Measured
from qprobe.system.wording import shortened

FILE = "ranks.csv"
SHARE = 0.9  # of the resamples that an interval holds
_RESAMPLES = 1_000  # the 5 % and 95 % points then rest on 50 resamples each
_SEED = 0  # any; fixed, so that equal units give equal intervals
_DTYPES = {"layer": "str", "rank": "Int64", "rank_low": "Int64", "rank_high": "Int64"}


def rank_intervals(run: Measured) -> pd.DataFrame:
    """The rank of each linear by sensitivity_kl and its 90 % interval, in execution order.

    Columns: layer, rank (from 1, the most sensitive), rank_low, rank_high; empty for a linear that was not
    measured, the interval also where a single sample was. Percentile bootstrap over samples: each resample
    draws as many samples with replacement and ranks the layers by sum of KL / sum of answer tokens again.
    """
    names = [x.name for x in run.measured_inventory.layers]
    kl, tokens = _by_sample(run.units("sensitivity"), names)
    rank = _ranks(kl.sum(axis=0, keepdims=True), tokens.sum(axis=0, keepdims=True))[0]
    low, high = _interval(kl, tokens)
    is_measured = tokens.sum(axis=0) > 0
    has_interval = is_measured & (len(kl) > 1)
    columns = {
        "layer": names,
        "rank": pd.array(rank, "Int64"),
        "rank_low": pd.array(low, "Int64"),
        "rank_high": pd.array(high, "Int64"),
    }
    frame = pd.DataFrame(columns)
    frame.loc[~is_measured, "rank"] = pd.NA
    frame.loc[~has_interval, ["rank_low", "rank_high"]] = pd.NA
    return frame


def write_ranks(run: Measured) -> None:
    """Write RUN/ranks.csv, see `rank_intervals`; nothing where no sensitivity was measured."""
    frame = rank_intervals(run)
    if frame["rank"].notna().any():
        run.files.write({FILE: (csv_bytes(frame), len(frame))})


def parse_ranks(path: Path, data: bytes) -> pd.DataFrame:
    """What `write_ranks` wrote, from `data`, the bytes of the file `path`; RunError if it is damaged."""
    try:
        return pd.read_csv(BytesIO(data), dtype=_DTYPES)[list(_DTYPES)]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise RunError(f"{path} is damaged ({shortened(str(error), 200)}). Run the scan again.") from None


def _by_sample(rows: pd.DataFrame, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(KL, answer tokens), (samples, layers) each, samples in the order of ids.

    Where a layer did not run on a sample its KL there is 0; where it is not finite, neither counts.
    """
    tokens = pd.Series(answer_tokens(rows), dtype=np.float64).sort_index()
    known = rows.pivot(index="sample", columns="layer", values="kl_sum")
    ran = rows.assign(ran=True).pivot(index="sample", columns="layer", values="ran")
    known, ran = (x.reindex(index=tokens.index, columns=names) for x in (known, ran))
    values = known.to_numpy(np.float64)
    is_broken = ran.notna().to_numpy() & ~np.isfinite(values)
    is_measured = np.isfinite(values).any(axis=0)
    counts = np.where(is_broken | ~is_measured, 0.0, tokens.to_numpy()[:, None])
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0), counts


def _interval(kl: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of each layer's rank over the resamples; (samples, layers) arrays."""
    samples, layers = kl.shape
    if samples == 0:
        return np.zeros(layers, int), np.zeros(layers, int)
    drawn = np.random.default_rng(_SEED).multinomial(samples, [1 / samples] * samples, size=_RESAMPLES)
    ranks = _ranks(drawn @ kl, drawn @ tokens)
    ends = [(1 - SHARE) / 2, (1 + SHARE) / 2]
    low, high = np.quantile(ranks, ends, axis=0, method="inverted_cdf")
    return low.astype(int), high.astype(int)


def _ranks(kl: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, from 1 for the largest kl / tokens; without tokens last, ties in order."""
    score = np.divide(kl, tokens, out=np.full(kl.shape, -np.inf), where=tokens > 0)
    order = np.argsort(-score, axis=-1, kind="stable")
    ranks = np.empty(order.shape, int)
    np.put_along_axis(ranks, order, np.arange(1, order.shape[-1] + 1)[None, :], axis=-1)
    return ranks
