"""What can be measured of each layer, declared as data; no torch.

A measure is one entry of `DECLARED` and one implementation in `qprobe.measure`. From the declarations follow
`--measures`, `--by`, the schemas of the unit files, the columns of layers.csv, the panels of figures and
page, and the headings of terminal tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qprobe.errors import QprobeError

Kind = Literal["text", "count", "number"]
"""What a column of a unit file holds: a string, an int64, a float64."""
Unit = Literal["weights", "batch", "half batch"]
"""What one unit of a stage covers: weights (of the model, or of one file of it), one batch of samples, or one
of the half of them that costly measures take (`qprobe.measure.runner.isolated_half`)."""
Need = Literal["samples", "head", "independent samples", "two nodes"]
Aggregate = Literal["nmse", "sqnr_db", "peak", "kl_share"]
"""How a layer's value follows from its rows; `qprobe.runs.layers.aggregates` has the functions."""


@dataclass(frozen=True)
class Stage:
    """The unit files that one kind of work leaves, one per unit.

    schema: columns of each file; sums are over a sample's tokens, kl_sum is in nats, null means not measured.
        propagated_rerouted: tokens that an expert reads in 16-bit alone, which its propagated sums leave out.
    key: the columns that name a row, which may stand in one unit only, or its sums would count twice.
    """

    name: str
    schema: Mapping[str, Kind]
    key: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """One number per layer: a column of layers.csv, and how it is shown.

    aggregate, over: how the number follows from the stage's columns that begin with `over` ("nmse" of
        "activation_" is activation_noise over activation_signal), or from the column `over` ("kl_share").
    unit, label, what: as pages and figures show them; heading: above a column of the terminal.
    better: which end is less damage. adds_up: False for decibels: they cannot choose layers.
    has_error: a column NAME_se with the standard error follows it.
    has_panel: it is drawn, on a logarithmic axis where is_log. is_shown: the page lists it.
    telling: how well it tells damage, the lowest first: the order of columns beside a score in the terminal;
        None to show it only where it is asked for. proposes: a scan makes candidates by it.
    """

    name: str
    aggregate: Aggregate
    over: str
    unit: str
    label: str
    heading: str
    what: str
    better: Literal["lower", "higher"] = "lower"
    adds_up: bool = True
    has_error: bool = False
    has_panel: bool = True
    is_log: bool = True
    is_shown: bool = True
    telling: int | None = 100
    proposes: bool = False

    @property
    def error_name(self) -> str | None:
        """The column with its standard error, if it has one."""
        return f"{self.name}_se" if self.has_error else None


@dataclass(frozen=True)
class Measure:
    """Something that is measured of every layer.

    name: after --measures. stage: the rows its columns are made of; unit: what one of its files covers.
    implementation: import path of what measures one unit. Of batches it is called with (subject, measures,
        batch), of "weights" with (subject), and returns the rows by stage. Measures with the same
        implementation are measured by one call. beside: stages that the same call fills as well.
    needs: what the model and the request must have for it. is_always: measured whenever samples run.
    follows: the measure it comes with; it is then not asked for by name.
    """

    name: str
    stage: Stage
    columns: tuple[Column, ...]
    implementation: str
    unit: Unit = "batch"
    beside: tuple[Stage, ...] = ()
    needs: frozenset[Need] = field(default=frozenset({"samples"}))
    is_always: bool = False
    follows: str | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage that its implementation fills for it."""
        return (*self.beside, self.stage)

    @property
    def score(self) -> str:
        """The column that layers are ranked and chosen by, the first one."""
        return self.columns[0].name

    @property
    def label(self) -> str:
        """What it is called in a sentence."""
        return self.columns[0].label


WEIGHTS = Stage(
    "weights",
    {"layer": "text", "expert": "count", "n": "count", "signal": "number", "noise": "number",
     "nonfinite": "count", "peak": "number"},
    ("layer", "expert"),
)  # fmt: skip
OUTPUTS = Stage(
    "outputs",
    {"sample": "text", "layer": "text", "expert": "count", "tokens": "count",
     "activation_n": "count", "activation_signal": "number", "activation_noise": "number",
     "activation_nonfinite": "count", "activation_peak": "number", "peak_token": "count", "peak_kind": "text",
     "propagated_n": "count", "propagated_signal": "number", "propagated_noise": "number",
     "propagated_nonfinite": "count", "propagated_rerouted": "count"},
    ("sample", "layer", "expert"),
)  # fmt: skip
KL = Stage(
    "kl",
    {
        "sample": "text",
        "candidate": "text",
        "answer_tokens": "count",
        "kl_sum": "number",
        "top1_agree": "count",
    },
    ("sample", "candidate"),
)
_SHARES: Mapping[str, Kind] = {
    "sample": "text",
    "layer": "text",
    "answer_tokens": "count",
    "kl_sum": "number",
}
SENSITIVITY = Stage("sensitivity", _SHARES, ("sample", "layer"))
ISOLATED = Stage("isolated", _SHARES, ("sample", "layer"))
CALIBRATION = Stage(
    "calibration",
    {"layer": "text", "tokens": "count", "error": "number", "damping": "number", "why": "text",
     "nearest": "count"},
    ("layer",),
)  # fmt: skip
"""Of calibrated weights: tokens seen; error of the outputs as a share of rounding to nearest; why a weight is
rounded to nearest after all, "" where it is not; of fused experts how many of them are, null for linears."""

_NATS = "nats / answer token"

WEIGHT = Measure(
    "weight",
    WEIGHTS,
    (
        Column(
            "weight_nmse", "nmse", "", "nmse", "weight error", "weight nmse",
            "squared error of the 4-bit weights / their squares", telling=4, proposes=True,
        ),
        Column(
            "weight_sqnr_db", "sqnr_db", "", "dB", "weight error", "weight dB",
            "the same in decibels",
            better="higher", adds_up=False, has_panel=False, is_shown=False, telling=None,
        ),
        Column(
            "weight_peak", "peak", "", "max |D|", "largest weight error", "weight peak",
            "of all weights; D is 4-bit minus 16-bit", has_panel=False, telling=None,
        ),
    ),
    "qprobe.measure.runner:observe_weights",
    unit="weights",
    needs=frozenset(),
    is_always=True,
)  # fmt: skip
ACTIVATION = Measure(
    "activation",
    OUTPUTS,
    (
        Column(
            "activation_nmse", "nmse", "activation_", "nmse", "activation error", "act. nmse",
            "squared error of the output, with 4-bit in this layer alone / its squares",
            telling=1, proposes=True,
        ),
        Column(
            "activation_sqnr_db", "sqnr_db", "activation_", "dB", "activation error", "act. dB",
            "the same in decibels",
            better="higher", adds_up=False, has_panel=False, is_shown=False, telling=None,
        ),
        Column(
            "activation_peak", "peak", "activation_", "max |D x|", "largest activation error", "act. peak",
            "of all tokens and outputs", telling=2,
        ),
    ),
    "qprobe.measure.runner:observe",
    is_always=True,
)  # fmt: skip
PROPAGATED = Measure(
    "propagated",
    OUTPUTS,
    (
        Column(
            "propagated_nmse", "nmse", "propagated_", "nmse", "propagated error", "prop. nmse",
            "squared error of the output, with 4-bit in every layer / its squares", telling=3,
        ),
    ),
    "qprobe.measure.runner:observe",
    needs=frozenset({"samples", "independent samples"}),
)  # fmt: skip
SENSITIVITY_KL = Measure(
    "sensitivity",
    SENSITIVITY,
    (
        Column(
            "sensitivity_kl", "kl_share", "kl_sum", _NATS, "sensitivity", "sensitivity",
            "share of the KL of standard 4-bit that this layer causes",
            has_error=True, is_log=False, telling=0, proposes=True,
        ),
    ),
    "qprobe.measure.runner:observe",
    beside=(KL,),
    needs=frozenset({"samples", "head"}),
)  # fmt: skip
ISOLATED_KL = Measure(
    "isolated KL",
    ISOLATED,
    (
        Column(
            "isolated_kl", "kl_share", "kl_sum", _NATS, "isolated KL", "isolated KL",
            "KL with 4-bit in this layer alone, to second order",
            has_error=True, has_panel=False, is_log=False, telling=None,
        ),
    ),
    "qprobe.measure.runner:observe_isolated",
    unit="half batch",
    needs=frozenset({"samples", "head", "two nodes"}),
    follows="sensitivity",
)  # fmt: skip

DECLARED: tuple[Measure, ...] = (WEIGHT, ACTIVATION, PROPAGATED, SENSITIVITY_KL, ISOLATED_KL)


def names() -> tuple[str, ...]:
    """What `--measures` may name."""
    return tuple(x.name for x in DECLARED if x.follows is None)


def columns() -> tuple[Column, ...]:
    """The columns of all measures, in the order of layers.csv; `Column.error_name` follows its column."""
    return tuple(column for measure in DECLARED for column in measure.columns)


def column(name: str) -> Column | None:
    """The column called `name`, if a measure has it."""
    return next((x for x in columns() if x.name == name), None)


def by_tellingness() -> tuple[Column, ...]:
    """The columns shown beside a score, the most telling first."""
    found = [(x.telling, x) for x in columns() if x.telling is not None]
    return tuple(x for _, x in sorted(found, key=lambda pair: pair[0]))


def proposing() -> tuple[str, ...]:
    """Names of the columns by which a scan makes candidates, the most telling first."""
    return tuple(x.name for x in by_tellingness() if x.proposes)


def measure_of(column_name: str) -> Measure | None:
    """The measure that has the column `column_name`."""
    return next((x for x in DECLARED if any(c.name == column_name for c in x.columns)), None)


def check_adds_up(column_name: str) -> None:
    """Raises QprobeError if the column of a measure does not add up over layers, so that it cannot choose."""
    found, measure = column(column_name), measure_of(column_name)
    if found is not None and measure is not None and not found.adds_up:
        unit = {"dB": "decibels"}.get(found.unit, found.unit)
        raise QprobeError(f"{column_name} is in {unit}, which do not add up. Choose by {measure.score}.")


def stages() -> tuple[Stage, ...]:
    """Every stage whose units a run folder may hold, each once."""
    of_measures = [stage for x in DECLARED for stage in x.stages]
    return tuple({stage.name: stage for stage in (*of_measures, CALIBRATION)}.values())
