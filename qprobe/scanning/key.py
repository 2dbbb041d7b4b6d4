"""What decides every number of a run: the specification in `scan.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qprobe.inputs.batch import Batch
from qprobe.measure.digests import inputs_digest, reading_digest
from qprobe.measure.subject import Subject
from qprobe.records import FormatSpec, Sample
from qprobe.runs.needed import Measures
from qprobe.system.versions import library_versions


def run_spec(
    subject: Subject,
    fmt: FormatSpec,
    measures: Measures,
    batches: Mapping[str, Sequence[Sequence[Sample]]],
    first: Batch,
    seed: int,
) -> dict[str, Any]:
    """The specification of a run: two runs with equal specifications give the same units.

    batches: of samples, by what is measured on them. first: one of them.
    """
    reference = subject.reference
    samples = [s for groups in batches.values() for group in groups for s in group]
    return {
        "model": asdict(reference.identity),
        "weights": subject.weights_digest,
        "format": asdict(fmt),
        "device": reference.device.type,
        "measures": asdict(measures),
        "processor": inputs_digest(first),
        "reading": reading_digest(reference.processor, samples),
        **{what: [[_named(s) for s in group] for group in groups] for what, groups in batches.items()},
        "seed": seed,
        "versions": library_versions(),
    }


def _named(sample: Sample) -> dict[str, Any]:
    return {"id": sample.id, "digest": sample.digest, "ends": sample.ends}
