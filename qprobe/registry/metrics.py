"""Metrics of an answer, declared as data; no torch.

A metric is one entry of `DECLARED` and one function of (sample, answer). From the declarations follow
`--metric`, and the headings of tables and pages. From Python any function of (sample, answer) to a number
can stand in the place of a name, see `qprobe.inputs.metrics.metric_of`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Declared:
    """One metric. name: after --metric; what: in a sentence of help.

    implementation: import path of a function of (sample, answer) to `qprobe.records.Score`.
    needs: what a sample must bring to count, in words.
    """

    name: str
    what: str
    implementation: str
    needs: str


GIVEN = "a given answer"
FACTS = "facts"
DECLARED = (
    Declared(
        "exact",
        "the answer equals the given one, but for outer white space and the Unicode form (NFC)",
        "qprobe.inputs.metrics:exact",
        GIVEN,
    ),
    Declared(
        "contains",
        "the given answer stands in it as whole words, upper and lower case alike",
        "qprobe.inputs.metrics:contains",
        GIVEN,
    ),
    Declared(
        FACTS,
        "the share of the sample's facts that it states, as the scenes of the demo models bring them",
        "qprobe.inputs.metrics:facts",
        "facts",
    ),
)


def names() -> tuple[str, ...]:
    """The names of the declared metrics."""
    return tuple(x.name for x in DECLARED)


def find(name: str) -> Declared | None:
    """The metric `name`, None if none is declared."""
    return next((x for x in DECLARED if x.name == name), None)
