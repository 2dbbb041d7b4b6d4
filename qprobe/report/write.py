"""The report of a run folder: its pictures, written beside its data."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from qprobe.errors import RunError
from qprobe.manifest import read_manifest, write_atomic
from qprobe.measure.store import read_scan
from qprobe.records import Scan
from qprobe.report.figures import frontier_plot, spike_plot
from qprobe.select.table import layer_table, read_table

MANIFEST = "skiplist.json"
FRONTIER = "frontier.csv"


def write_report(folder: Path, out: Path | None = None) -> list[Path]:
    """The files of the report on the run `folder`, written to `out` (default: folder/report).

    spikes.png and spikes.svg; frontier.png where the run has a frontier.csv.
    Raises RunError if the run is missing or holds no finished measurement.
    """
    scan = read_scan(folder)
    table = read_table(folder) if (folder / "layers.csv").is_file() else layer_table(folder)
    if table.empty:
        raise RunError(
            f"Run {folder} has no layer table yet, so there is nothing to draw. Run `qprobe scan` again."
        )
    figure = spike_plot(table, kept_layers(folder, scan), f"{scan.model.id}: what 4-bit costs each layer")
    figures = {"spikes.png": figure, "spikes.svg": figure}
    if (folder / FRONTIER).is_file():
        frontier = pd.read_csv(folder / FRONTIER)
        figures["frontier.png"] = frontier_plot(frontier, f"{scan.model.id}: KL by budget")
    target = out if out is not None else folder / "report"
    try:
        target.mkdir(parents=True, exist_ok=True)
        return [_save(drawn, target / name) for name, drawn in figures.items()]
    except OSError as error:
        raise RunError(f"{target} cannot be written ({error.strerror}). Pass another --out.") from error


def kept_layers(folder: Path, scan: Scan) -> frozenset[str]:
    """Layers in 16-bit by the run's manifest; without one, those that are fixed there."""
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder / MANIFEST)
        return frozenset(layer.name for layer in manifest.layers if layer.precision == "bf16")
    return frozenset(layer.name for layer in scan.inventory.layers if layer.fixed)


def _save(figure: Figure, path: Path) -> Path:
    """Same figure, same bytes: no dates, and ids in the SVG that hash its content."""
    drawn = BytesIO()
    metadata = {"Software": None} if path.suffix == ".png" else {"Date": None}
    with matplotlib.rc_context({"svg.hashsalt": "qprobe", "svg.fonttype": "none"}):
        figure.savefig(drawn, format=path.suffix[1:], dpi=110, metadata=metadata)
    write_atomic(path, drawn.getvalue())
    return path
