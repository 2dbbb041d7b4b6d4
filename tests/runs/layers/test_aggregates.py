"""How a layer's number follows from its rows."""

from __future__ import annotations

from math import isnan

import pandas as pd

from qprobe.runs.layers.aggregates import LayerRows, kl_share


def shares(**tokens: int) -> tuple[float, float | None]:
    """Of a layer that adds 0.5 to each sample with answer tokens."""
    values = [0.5 if count else 0.0 for count in tokens.values()]
    rows = pd.DataFrame({"sample": list(tokens), "kl": values, "answer_tokens": list(tokens.values())})
    return kl_share(LayerRows(rows, tokens), "kl")


def test_samples_without_answer_tokens_count_for_nothing():
    assert shares(a=2, b=3, c=0)[0] == 1.0 / 5
    assert shares(a=2, b=3, c=0) == shares(a=2, b=3)


def test_where_no_answer_token_was_read_a_share_is_unknown_and_not_zero():
    share, error = shares(a=0, b=0)
    assert isnan(share) and error is not None and isnan(error)
