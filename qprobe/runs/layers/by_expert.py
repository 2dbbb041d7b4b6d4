"""What was measured of each expert of a fused weight, for the readers of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qprobe.runs.layers.table import experts
from qprobe.runs.measured import Measured
from qprobe.system.wording import counted


@dataclass(frozen=True)
class Expert:
    """One expert. tokens: that were routed to it; None where no sample ran.

    Errors are None where they are not known: weight_nmse where it was not measured, activation_nmse of an
    expert that read no token as well.
    """

    tokens: int | None
    weight_nmse: float | None
    activation_nmse: float | None


def by_expert(run: Measured) -> dict[str, tuple[Expert, ...]]:
    """The experts of each fused weight by its name, in their order; empty for a model without."""
    found: dict[str, list[Expert]] = {}
    for row in experts(run).to_dict("records"):
        tokens, weight, activation = (row[x] for x in ("tokens", "weight_nmse", "activation_nmse"))
        one = Expert(_known(tokens, int), _known(weight, float), _known(activation, float))
        found.setdefault(str(row["layer"]), []).append(one)
    return {layer: tuple(ones) for layer, ones in found.items()}


def _known(value: Any, kind: type) -> Any:
    return None if pd.isna(value) else kind(value)


def worst_expert(ones: Sequence[Expert]) -> int | None:
    """The number of the expert that errs most on its tokens, or in its weights where none ran; None where
    neither is known.
    """
    for errors in ([x.activation_nmse for x in ones], [x.weight_nmse for x in ones]):
        known = [(error, -number) for number, error in enumerate(errors) if error is not None]
        if known:
            return -max(known)[1]
    return None


def expert_sentences(found: Mapping[str, Sequence[Expert]]) -> list[str]:
    """One sentence per fused weight: which expert errs most, and of how many nothing is known."""
    return [_sentence(layer, ones) for layer, ones in found.items()]


def _sentence(layer: str, ones: Sequence[Expert]) -> str:
    worst = worst_expert(ones)
    if worst is None:
        return f"{layer}: nothing is known of its {counted(len(ones), 'expert')}."
    one, read = ones[worst], [x.tokens for x in ones if x.tokens is not None]
    if one.activation_nmse is None or one.tokens is None:
        return f"{layer}: of {len(ones)} experts {worst} errs most, weight_nmse {one.weight_nmse:.2g}."
    said = (
        f"{layer}: of {len(ones)} experts {worst} errs most, activation_nmse {one.activation_nmse:.2g} on "
        f"{one.tokens:,} of {counted(sum(read), 'token')}"
    )
    silent = read.count(0)
    unknown = f"; {silent} read no token, so the error of their outputs is unknown" if silent else ""
    return f"{said}{unknown}."
