"""The comparison that `qprobe compare` left in a run folder: RUN/compare.json.

The object of `compare --json` (rows, metrics and samples), and skip_modules, the layers in 16-bit of the
manifest that was compared, by which a reader sees whether it still is the run's.
"""

from __future__ import annotations

from typing import Any

from qprobe.errors import RunError
from qprobe.runs.folder import RunFolder
from qprobe.system.decoding import strict_json
from qprobe.system.wording import shortened

FILE = "compare.json"
_NUMBERS = ("kl", "kl_se", "top1_agreement", "answer_agreement")


def read_comparison(run: RunFolder) -> dict[str, Any] | None:
    """What `compare` left in `run`, None if nothing; raises RunError if the file is damaged."""
    data = run.files.read(FILE)
    if data is None:
        return None
    try:
        found = strict_json(data)
        for row in found["rows"]:
            _check_row(row)
        for metric in found["metrics"]:
            _check_metric(metric)
        for sample in found["samples"]:
            _check_texts([sample["id"], sample["prompt"], *sample["answers"], *sample["answers"].values()])
        _check_texts(found["skip_modules"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"{run.path / FILE} is damaged ({shortened(str(error), 100)}). Delete it, or run "
            "`qprobe compare` again."
        ) from None
    return found


def _check_row(row: dict[str, Any]) -> None:
    _check_texts([row["name"]])
    if not all(type(row[key]) is int for key in ("parameter_bytes", "total_bytes")):
        raise ValueError(f"row {row['name']} has no bytes")
    if not all(row[key] is None or type(row[key]) in (int, float) for key in _NUMBERS):
        raise ValueError(f"row {row['name']} holds something that is no number")


def _check_metric(metric: dict[str, Any]) -> None:
    """As `qprobe.runs.scored.Scored.to_json` writes it."""
    _check_texts([metric["name"], *metric["means"]])
    _check_texts([x[key] for x in metric["differences"] for key in ("model", "against")])
    numbers = [x[key] for x in (*metric["means"].values(), *metric["differences"]) for key in ("value", "se")]
    if not all(x is None or type(x) in (int, float) for x in numbers):
        raise ValueError(f"metric {metric['name']} holds something that is no number")
    if not all(type(metric[key]) is int for key in ("samples", "left_out")):
        raise ValueError(f"metric {metric['name']} counts no samples")
    flags = (metric["is_share"], *(x["is_found"] for x in metric["differences"]))
    if not all(x is None or type(x) is bool for x in flags):
        raise ValueError(f"metric {metric['name']} has a flag that is neither true nor false")


def _check_texts(values: list[Any]) -> None:
    if not all(isinstance(value, str) for value in values):
        raise ValueError("something is no text")
