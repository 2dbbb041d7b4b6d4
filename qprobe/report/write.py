"""The report of a run folder: its pictures and its page, written beside its data."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from qprobe.errors import RunError
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import NOTHING, Compared, Manifest
from qprobe.records import Scan
from qprobe.report.against import Side, against_plot
from qprobe.report.figures import COLUMN, PAGE, Kept, Layout, spike_plot
from qprobe.report.frontier import frontier_plot
from qprobe.report.page import page_html
from qprobe.report.panels import panel_columns, taken
from qprobe.report.payload import page_data
from qprobe.runs.store import read_scan
from qprobe.runs.table import layer_table, read_table
from qprobe.selection.scores import predicted_kl
from qprobe.system.files import write_atomic

MANIFEST = "skiplist.json"
FRONTIER = "frontier.csv"
PAGE_FILE = "index.html"


def write_report(folder: Path, out: Path | None = None, against: Path | None = None) -> list[Path]:
    """The files of the report on the run `folder`, written to `out` (default: folder/report).

    index.html, spikes.png and spikes.svg, the same at the width of a column (spikes-column.png and .svg), and
    frontier.png where the run has a frontier.csv. against: another run of the same model, drawn beside this
    one in against.png and against.svg.
    Raises RunError if a run is missing or holds no finished measurement, or the two share no layer.
    """
    scan, table = _measured(folder)
    theirs = None if against is None else _measured(against)
    target = out if out is not None else folder / "report"
    try:
        target.mkdir(
            parents=True, exist_ok=True
        )  # before the work: a place that cannot be written costs none
        files = {PAGE_FILE: page_of(folder), **_pictures(folder, scan, table)}
        if against is not None and theirs is not None:
            files |= _both("against", _against(folder, against, (scan, table), theirs), PAGE)
        for name, data in files.items():
            write_atomic(target / name, data)
    except OSError as error:
        raise RunError(
            f"{target} cannot be written ({error.strerror}). Make room, or pass another --out."
        ) from error
    return [target / name for name in files]


def _pictures(folder: Path, scan: Scan, table: pd.DataFrame) -> dict[str, bytes]:
    """The pictures of one run by file name."""
    kept, model = kept_layers(folder, scan), f"{scan.model.id} in {scan.format.name}"
    manifest = _manifest(folder)
    files = _both("spikes", spike_plot(table, kept, f"{model}: what 4-bit costs each layer"), PAGE)
    files |= _both("spikes-column", spike_plot(table, kept, model, COLUMN), COLUMN)
    if (folder / FRONTIER).is_file():
        compared = manifest.compared if manifest else ()
        frontier = _frontier(folder, scan, table, compared)
        figure = frontier_plot(frontier, f"{model}: KL by size", compared)
        files["frontier.png"] = _image(figure, "png", PAGE)
    return files


def _both(name: str, figure: Figure, layout: Layout) -> dict[str, bytes]:
    return {f"{name}.{kind}": _image(figure, kind, layout) for kind in ("png", "svg")}


def page_of(folder: Path) -> bytes:
    """The page of the run `folder` alone; raises RunError as `write_report` does."""
    scan, table = _measured(folder)
    title = f"{scan.model.id}: which layers 4-bit hurts"
    return page_html(page_data(folder, scan, table, _manifest(folder)), title).encode()


def _manifest(folder: Path) -> Manifest | None:
    return read_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def missing_measures(folder: Path) -> list[str]:
    """What the report on the run `folder` leaves out since it was not measured, in words."""
    _, table = _measured(folder)
    present = taken([table])
    frontier = [] if (folder / FRONTIER).is_file() else ["KL on held-out samples (frontier)"]
    return [*(p.label for p in panel_columns() if p not in present), *frontier]


def kept_layers(folder: Path, scan: Scan) -> Kept:
    """Layers in 16-bit by the run's manifest; without one, only those that standard 4-bit keeps."""
    manifest = _manifest(folder)
    always = frozenset(layer.name for layer in scan.inventory.layers if layer.fixed)
    in_16bit = frozenset() if manifest is None else frozenset(manifest.skip_modules)
    return Kept(in_16bit - always, always)


def _measured(folder: Path) -> tuple[Scan, pd.DataFrame]:
    """The scan in `folder` and its layer table, from the units where layers.csv is not written yet."""
    scan = read_scan(folder)
    table = read_table(folder) if (folder / "layers.csv").is_file() else layer_table(folder)
    if table.empty:
        raise RunError(
            f"Run {folder} has no layer table yet, so there is nothing to draw. Run `qprobe scan` again."
        )
    return scan, table


def _frontier(folder: Path, scan: Scan, table: pd.DataFrame, compared: Sequence[Compared]) -> pd.DataFrame:
    """The rows of frontier.csv, and before them the list that keeps nothing, where it was measured."""
    columns = ["budget_bytes", "predicted_kl", "measured_kl", "measured_kl_se", "candidate"]
    try:
        frontier = pd.read_csv(folder / FRONTIER, usecols=columns)
    except (ValueError, OSError) as error:
        raise RunError(f"{folder / FRONTIER} is damaged ({error}). Run the scan again.") from None
    nothing = next((x for x in compared if x.name == NOTHING and x.kl is not None), None)
    if nothing is None:
        return frontier
    row = {
        "budget_bytes": scan.inventory.standard_4bit_bytes,
        "predicted_kl": predicted_kl(table, frozenset(x.name for x in scan.inventory.layers if x.fixed)),
        "measured_kl": nothing.kl,
        "measured_kl_se": nothing.kl_se,
        "candidate": NOTHING,
    }
    return pd.concat([pd.DataFrame([row]), frontier], ignore_index=True)


def _against(
    folder: Path, other: Path, mine: tuple[Scan, pd.DataFrame], theirs: tuple[Scan, pd.DataFrame]
) -> Figure:
    if not _is_same_model(mine[0], theirs[0]):
        one, two = (f"{scan.model.id} ({scan.model.architecture})" for scan in (mine[0], theirs[0]))
        raise RunError(
            f"{folder} is a run of {one} and {other} one of {two}: their layers cannot be put side "
            "by side. Pass two runs of one model to --against."
        )
    names = [path.resolve().name for path in (folder, other)]  # a path would tell where its user keeps it
    one, two = (
        Side(f"{name}: {scan.model.id}, {scan.format.name}", table)
        for name, (scan, table) in zip(names, (mine, theirs), strict=True)
    )
    return against_plot(one, two, f"{names[0]} against {names[1]}")


def _is_same_model(one: Scan, other: Scan) -> bool:
    """True for equal names, or equal weights under another name, of one architecture."""
    weights = one.spec.get("weights")
    is_same = one.model.id == other.model.id or (weights is not None and weights == other.spec.get("weights"))
    return is_same and one.model.architecture == other.model.architecture


def _image(figure: Figure, kind: str, layout: Layout) -> bytes:
    """Same figure, same bytes: no dates, and ids in the SVG that hash its content."""
    drawn = BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None}
    figure.set_dpi(layout.dpi)
    with matplotlib.rc_context({"svg.hashsalt": "qprobe", "svg.fonttype": "none"}):
        # Not `savefig`, which draws everything once before, for the sake of a layout that stands already.
        if kind == "png":
            FigureCanvasAgg(figure).print_png(drawn, metadata=metadata)
        else:
            FigureCanvasSVG(figure).print_svg(drawn, metadata=metadata)
    return drawn.getvalue()
