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
from qprobe.runs.folder import AnyRun, RunFolder, run_folder
from qprobe.runs.key import DAMAGE, Key
from qprobe.selection.scores import predicted_kl
from qprobe.system.files import make_folder, make_named_folder, write_atomic

MANIFEST = "skiplist.json"
FRONTIER = "frontier.csv"
PAGE_FILE = "index.html"


def write_report(run: AnyRun, out: Path | None = None, against: AnyRun | None = None) -> list[Path]:
    """The files of the report on the run folder `run`, written to `out` (default: RUN/report).

    index.html, spikes.png and spikes.svg, the same at the width of a column (spikes-column.png and .svg), and
    frontier.png where the run has a frontier.csv. against: another run of the same model, drawn beside this
    one in against.png and against.svg.
    Raises RunError if a run is missing or holds no finished measurement, or the two share no layer.
    """
    mine, other = run_folder(run), None if against is None else run_folder(against)
    scan, table = _measured(mine)
    theirs = None if other is None else _measured(other)
    target = out if out is not None else mine.path / "report"
    try:
        # Before the work: a place that cannot be written costs none. What a user names may be a link.
        make_named_folder(target) if out is not None else make_folder(target)
        manifest = _manifest(mine)
        page = _page(mine, scan, table, manifest)
        files = {PAGE_FILE: page, **_pictures(mine, scan, table, manifest)}
        if other is not None and theirs is not None:
            files |= _both("against", _against(mine, other, (scan, table), theirs), PAGE)
        for name, data in files.items():
            write_atomic(target / name, data)
    except OSError as error:
        raise RunError(
            f"{target} cannot be written ({error.strerror}). Make room, or pass another --out."
        ) from error
    return [target / name for name in files]


def _pictures(run: RunFolder, scan: Scan, table: pd.DataFrame, manifest: Manifest | None) -> dict[str, bytes]:
    """The pictures of one run by file name."""
    kept, model = _kept(scan, manifest), f"{scan.model.id} in {scan.format.name}"
    files = _both("spikes", _spikes(scan, table, kept), PAGE)
    files |= _both("spikes-column", spike_plot(table, kept, model, COLUMN), COLUMN)
    if run.files.has(FRONTIER):
        compared = manifest.compared if manifest else ()
        frontier = _frontier(run, scan, table, compared)
        damage = DAMAGE[scan.readout]
        figure = frontier_plot(frontier, f"{model}: {damage.name} by size", compared, damage)
        files["frontier.png"] = _image(figure, "png", PAGE)
    return files


def spikes(run: RunFolder) -> Figure:
    """The spikes of one run: every measured error of each layer; RunError if nothing is measured yet."""
    scan, table = _measured(run)
    return _spikes(scan, table, kept_layers(run, scan))


def _spikes(scan: Scan, table: pd.DataFrame, kept: Kept) -> Figure:
    return spike_plot(table, kept, f"{scan.model.id} in {scan.format.name}: what 4-bit costs each layer")


def _both(name: str, figure: Figure, layout: Layout) -> dict[str, bytes]:
    return {f"{name}.{kind}": _image(figure, kind, layout) for kind in ("png", "svg")}


def page_of(run: RunFolder) -> bytes:
    """The page of `run` alone; raises RunError as `write_report` does."""
    return _page(run, *_measured(run), _manifest(run))


def _page(run: RunFolder, scan: Scan, table: pd.DataFrame, manifest: Manifest | None) -> bytes:
    title = f"{scan.model.id}: which layers 4-bit hurts"
    return page_html(page_data(run, scan, table, manifest), title).encode()


def _manifest(run: RunFolder) -> Manifest | None:
    return read_manifest(run.path / MANIFEST) if run.files.has(MANIFEST) else None


def missing_measures(run: RunFolder) -> list[str]:
    """What the report on `run` leaves out since it was not measured, in words."""
    _, table = _measured(run)
    present = taken([table])
    frontier = [] if run.files.has(FRONTIER) else ["KL on held-out samples (frontier)"]
    return [*(p.label for p in panel_columns() if p not in present), *frontier]


def kept_layers(run: RunFolder, scan: Scan) -> Kept:
    """Layers in 16-bit by the run's manifest; without one, only those that standard 4-bit keeps."""
    return _kept(scan, _manifest(run))


def _kept(scan: Scan, manifest: Manifest | None) -> Kept:
    always = frozenset(layer.name for layer in scan.inventory.layers if layer.fixed)
    in_16bit = frozenset() if manifest is None else frozenset(manifest.skip_modules)
    return Kept(in_16bit - always, always)


def _measured(run: RunFolder) -> tuple[Scan, pd.DataFrame]:
    """What is known of the scan and its layer table, from the units where layers.csv is not written yet."""
    scan, table = run.scan, run.table_so_far
    if table.empty:
        raise RunError(
            f"Run {run.path} has no layer table yet, so there is nothing to draw. Run `qprobe scan` again."
        )
    return scan, table


def _frontier(run: RunFolder, scan: Scan, table: pd.DataFrame, compared: Sequence[Compared]) -> pd.DataFrame:
    """The rows of frontier.csv, and before them the list that keeps nothing, where it was measured."""
    columns = ["budget_bytes", "predicted_kl", "measured_kl", "measured_kl_se", "candidate"]
    try:
        frontier = pd.read_csv(BytesIO(run.files.read(FRONTIER) or b""), usecols=columns)
    except ValueError as error:
        raise RunError(f"{run.path / FRONTIER} is damaged ({error}). Run the scan again.") from None
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
    run: RunFolder, other: RunFolder, mine: tuple[Scan, pd.DataFrame], theirs: tuple[Scan, pd.DataFrame]
) -> Figure:
    if not _is_same_model(run.key, other.key):
        one, two = (f"{scan.model.id} ({scan.model.architecture})" for scan in (mine[0], theirs[0]))
        raise RunError(
            f"{run.path} is a run of {one} and {other.path} one of {two}: their layers cannot be put side "
            "by side. Pass two runs of one model to --against."
        )
    names = [x.path.resolve().name for x in (run, other)]  # a path would tell where its user keeps it
    one, two = (
        Side(f"{name}: {scan.model.id}, {scan.format.name}", table)
        for name, (scan, table) in zip(names, (mine, theirs), strict=True)
    )
    return against_plot(one, two, f"{names[0]} against {names[1]}")


def _is_same_model(one: Key, other: Key) -> bool:
    """True for equal names, or equal weights under another name, of one architecture."""
    is_same = one.model.id == other.model.id or one.spec.weights == other.spec.weights
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
