"""Everything the page shows, as JSON values: the run folder seen by `page/*.js`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

import pandas as pd

from qprobe import __version__
from qprobe.errors import ManifestError
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import NEAREST, NOTHING, Manifest
from qprobe.manifest.write import manifest_to_json
from qprobe.records import Scan
from qprobe.registry.measures import PROPAGATED, Column, columns
from qprobe.registry.precisions import SIXTEEN_BIT
from qprobe.report.budgets import KL, Point, Prediction, command_at, manifest_at, points, quality_at, reasons
from qprobe.report.comparison import read_comparison
from qprobe.report.names import kind_of, short_names
from qprobe.report.panels import panel_columns, spike_indices, taken
from qprobe.report.worst import Worst, worst_tokens
from qprobe.runs.findings import rerouted_note
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import DAMAGE
from qprobe.runs.layers.by_expert import Expert, by_expert, worst_expert
from qprobe.runs.layers.table import attribution_residual
from qprobe.runs.shown import ShownSample
from qprobe.system.wording import visible

TRANSPOSED = (
    "Its weights lie transposed, so that weights of different outputs share the scale of a block. One large "
    "output takes the scale from the others of its blocks, and hides what they lose in the activation error, "
    "which is a share of all outputs together. The sensitivity shows it."
)
_OF_A_SCAN = ("qprobe scan ", "qprobe.scan(")  # how the record of a list begins that a scan chose


def page_data(run: RunFolder, scan: Scan, table: pd.DataFrame, manifest: Manifest | None) -> dict[str, Any]:
    """The JSON value that the page is made of; None stands for what was not measured.

    manifest: the run's skiplist.json, if it has one.
    """
    shown = run.samples
    worst = worst_tokens(run, shown)
    frontier = points(run, scan, table)
    comparison = read_comparison(run)
    used = {w.sample for w in worst.values()}
    own, shared = _chosen_and_base(run, scan, table, frontier, manifest)
    damage = DAMAGE[scan.readout]
    told = plain(
        {
            "qprobe": __version__,
            "names": {"nothing": NOTHING, "nearest": NEAREST},
            "run": run.path.resolve().name,
            "model": asdict(scan.model),
            "format": asdict(scan.format),
            "damage": {"what": damage.what, "name": damage.name, "unit": damage.unit},
            "precisions": {"four_bit": scan.format.four_bit_name, "sixteen_bit": SIXTEEN_BIT.name},
            "bytes": _bytes(scan),
            "measures": _measures(run, table),
            "panels": _panels(table),
            "layers": _layers(run, scan, table, worst, frontier),
            "samples": {name: _sample(sample) for name, sample in shown.items() if name in used},
            "points": [_point(point) for point in frontier],
            "comparison": comparison,
            "comparison_is_current": bool(
                comparison and manifest and comparison["skip_modules"] == list(manifest.skip_modules)
            ),
            "method": _method(run, scan, table, manifest),
        }
    )
    # Manifests that can be downloaded are as `select` writes them; all else is for eyes.
    return {**_visible(told), "chosen": own, "base": shared}


def _visible(value: Any) -> Any:
    """`value` with escapes for what is not seen in its texts; ids become the same everywhere."""
    if isinstance(value, str):
        return visible(value, kept="\n\t")
    if isinstance(value, Mapping):
        return {_visible(key): _visible(item) for key, item in value.items()}
    return [_visible(item) for item in value] if isinstance(value, list) else value


def _chosen_and_base(
    run: RunFolder, scan: Scan, table: pd.DataFrame, frontier: Sequence[Point], manifest: Manifest | None
) -> tuple[Any, Any]:
    chosen = None if manifest is None else _chosen(run, scan, table, manifest)
    return plain(chosen), plain(_base(run, scan, table, frontier))


def plain(value: Any) -> Any:
    """`value` with NaN, infinity and NA as None and numpy's numbers as Python's, all the way down."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or value is pd.NA:
        return None
    scalar = value.item() if hasattr(value, "item") else value
    return None if isinstance(scalar, float) and not isfinite(scalar) else scalar


def _bytes(scan: Scan) -> dict[str, int]:
    """Of the model with every layer in 4-bit, and with every layer in 16-bit."""
    return {
        "standard": scan.inventory.standard_4bit_bytes,
        "full": scan.inventory.total_bytes(frozenset(x.name for x in scan.inventory.layers)),
    }


def _measures(run: RunFolder, table: pd.DataFrame) -> list[dict[str, Any]]:
    """The columns that are shown and were measured."""
    return [
        {"column": x.name, "error": x.error_name, "name": x.label, "unit": x.unit, "what": _what(run, x)}
        for x in columns()
        if x.is_shown and table[x.name].notna().any()
    ]


def _what(run: RunFolder, column: Column) -> str:
    """What the column is, and what it leaves out in this run."""
    rerouted = rerouted_note(run) if column in PROPAGATED.columns else None
    return f"{column.what}. {rerouted}" if rerouted else column.what


def _panels(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The charts: one for each measure that was taken, and which layers stand out in it."""
    return [
        {
            "column": panel.name,
            "error": panel.error_name,
            "label": f"{panel.label} ({panel.unit})",
            "log": panel.is_log,
            "spikes": spike_indices(table, panel),
        }
        for panel in taken([table])
    ]


def _layers(
    run: RunFolder, scan: Scan, table: pd.DataFrame, worst: Mapping[str, Worst], frontier: Sequence[Point]
) -> list[dict[str, Any]]:
    by = frontier[0].skiplist.by if frontier else None
    four_bit = scan.format.precision.stored.title
    not_kept, kept = reasons(scan, table, by) if by else ([four_bit] * len(table), [""] * len(table))
    short = short_names(table["layer"])
    known = {} if run.ranks is None else run.ranks.set_index("layer").to_dict("index")
    values = [name for x in columns() if x.is_shown for name in (x.name, x.error_name) if name]
    fused = by_expert(run)
    return [
        {
            "name": linear.name,
            "short": short[linear.name],
            "kind": kind_of(linear.name),
            "tower": linear.tower,
            "checkpoint_name": linear.checkpoint_name,
            "shape": linear.shape,
            "bytes_4bit": linear.bytes_4bit,
            "bytes_16bit": linear.bytes_16bit,
            "fixed": linear.fixed,
            "reasons": [without, with_it],
            "values": {name: row[name] for name in values},
            "rank": known.get(linear.name),
            "worst": asdict(worst[linear.name]) if linear.name in worst else None,
            "experts": _experts(fused.get(linear.name, ())),
            "note": TRANSPOSED if linear.transposed else None,
        }
        for linear, row, without, with_it in zip(
            scan.inventory.layers, table.to_dict("records"), not_kept, kept, strict=True
        )
    ]


def _experts(ones: Sequence[Expert]) -> dict[str, Any] | None:
    """The experts of a fused weight and which of them errs most; None for a plain linear. Rounded: there may
    be ten thousand.
    """
    if not ones:
        return None
    columns = {"tokens": [x.tokens for x in ones], "worst": worst_expert(ones)}
    return columns | {
        name: [None if x is None else float(f"{x:.3g}") for x in values]
        for name, values in (
            ("activation_nmse", [x.activation_nmse for x in ones]),
            ("weight_nmse", [x.weight_nmse for x in ones]),
        )
    }


def _sample(sample: ShownSample) -> dict[str, Any]:
    return {key: getattr(sample, key) for key in ("id", "prompt", "answer", "thumbnail")}


def _kl(kl: KL | None) -> dict[str, Any] | None:
    return None if kl is None else asdict(kl)


def _point(point: Point) -> dict[str, Any]:
    return {
        "limit_bytes": point.budget.limit_bytes,
        "total_bytes": point.skiplist.total_bytes,
        "by": point.skiplist.by,
        "predicted": _kl(point.predicted),
        "measured": _kl(point.measured),
        "kept": list(point.skiplist.kept),
    }


def _chosen(run: RunFolder, scan: Scan, table: pd.DataFrame, manifest: Manifest) -> dict[str, Any]:
    """The run's own manifest, and what it is predicted to leave."""
    kept = frozenset(manifest.skip_modules)
    predicted = Prediction(run, scan, table).left_by(kept)
    return {"manifest": manifest_to_json(manifest), "predicted": _kl(predicted)}


def _base(
    run: RunFolder, scan: Scan, table: pd.DataFrame, frontier: Sequence[Point]
) -> dict[str, Any] | None:
    """What the manifests of all points share, and what each has alone that its list does not tell."""
    if not frontier:
        return None
    manifest = manifest_at(run, scan, table, frontier[0])
    whole = manifest_to_json(manifest)
    own = {"budget", "quality", "compared", "layers", "skip_modules", "made_by"}
    return {
        "shared": {key: value for key, value in whole.items() if key not in own},
        "qualities": [asdict(quality_at(point, manifest.quality)) for point in frontier],
        "commands": [command_at(run, point) for point in frontier],
    }


def _method(run: RunFolder, scan: Scan, table: pd.DataFrame, manifest: Manifest | None) -> dict[str, Any]:
    """How it was measured: what decides the numbers, and what a reader must know of them."""
    spec = run.key.spec
    counted = {
        name: sum(map(len, batches))
        for name, batches in (("calibration", spec.calibration), ("held_out", spec.held_out))
    }
    residual, end = attribution_residual(run), run.notes.get("end")
    return {
        "command": _command(run, scan, manifest),
        "versions": spec.versions or {},
        "device": spec.device,
        "seed": spec.seed,
        "samples": counted,
        "nodes": spec.measures.nodes if spec.measures else None,
        "attribution_residual": residual,
        "seconds": scan.seconds,
        "peak_bytes": scan.peak_bytes,
        "metric": None if end is None or end.metric is None else end.metric.to_json(),
        "status": scan.status,
        "notes": list(scan.notes),
        "missing": [x.label for x in panel_columns() if x not in taken([table])],
        "unmeasured": list(scan.unmeasured),
    }


def _command(run: RunFolder, scan: Scan, manifest: Manifest | None) -> str:
    """What made the run, and its skip-list if that was chosen again later."""
    made = "" if manifest is None else manifest.made_by.command
    if made.startswith(_OF_A_SCAN):
        return made
    first = _first_command(run) or f"qprobe scan --model {scan.model.id}"
    both = ", then " if first.startswith("qprobe.") else " && "
    return f"{first}{both}{made}" if made else first


def _first_command(run: RunFolder) -> str | None:
    """What made the scan, by the list of its own that `select` has set aside."""
    for name in ("skiplist-measured.json", "skiplist-before.json"):
        try:
            made = read_manifest(run.path / name).made_by.command
        except ManifestError:
            continue
        if made.startswith(_OF_A_SCAN):
            return made
    return None
