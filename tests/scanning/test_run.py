"""The `Run` that Python users hold: over a scan that ended here, and over a folder that is opened."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

import qprobe
from qprobe.errors import BudgetError, RunError
from qprobe.report.panels import taken
from qprobe.scanning.run import Run
from tests.scanning.asked import Scanned, TinyFolder, options


@pytest.fixture
def opened(scanned: Scanned, tmp_path: Path) -> Run:
    """A copy of a finished scan's folder."""
    shutil.copytree(scanned("llama").run, tmp_path / "run")
    return qprobe.open_run(tmp_path / "run")


def test_an_opened_run_knows_what_its_scan_gave_back(scanned: Scanned):
    found = scanned("llama")
    opened = qprobe.open_run(str(found.run))
    # Notes on the selection belong to the scan alone; the folder may be asked for another list.
    assert replace(opened.result, notes=found.notes) == found
    assert set(opened.notes) <= set(found.notes)
    assert opened.to_json().keys() == found.to_json().keys()


def test_layers_is_the_table_and_a_copy_of_it(opened: Run):
    wanted, table = pd.read_csv(opened.path / "layers.csv"), opened.layers
    assert table["layer"].tolist() == wanted["layer"].tolist()
    # pandas 2 reads a number off by a bit.
    pd.testing.assert_series_equal(table["sensitivity_kl"], wanted["sensitivity_kl"], rtol=1e-12)
    table["sensitivity_kl"] = 0.0
    pd.testing.assert_series_equal(opened.layers["sensitivity_kl"], wanted["sensitivity_kl"], rtol=1e-12)


@pytest.mark.slow
def test_plot_draws_a_panel_for_each_measure(opened: Run):
    figure = opened.plot()
    assert isinstance(figure, Figure)
    assert len(figure.axes) == len(taken([opened.layers]))


def test_select_writes_nothing_unless_it_is_told_where(opened: Run, tmp_path: Path):
    before = {x: x.read_bytes() for x in opened.path.rglob("*") if x.is_file()}
    manifest = opened.select("+30%")
    assert {x: x.read_bytes() for x in opened.path.rglob("*") if x.is_file()} == before
    assert manifest.budget.requested == "+30%"

    same = opened.select("+30%", out=tmp_path / "more.json")
    assert qprobe.read_manifest(tmp_path / "more.json") == same
    assert same.skip_modules == manifest.skip_modules
    assert qprobe.select(opened, "+30%").skip_modules == manifest.skip_modules  # as of its path
    pd.testing.assert_frame_equal(qprobe.layer_table(opened), opened.layers)
    with pytest.raises(BudgetError):
        opened.select("1KiB")


def test_select_into_the_skiplist_sets_the_measured_one_aside(opened: Run):
    assert opened.skiplist is not None
    measured = opened.skiplist.read_bytes()
    manifest = opened.select("+30%", out=opened.skiplist)
    assert qprobe.read_manifest(opened.skiplist) == manifest
    assert (opened.path / "skiplist-measured.json").read_bytes() == measured
    assert qprobe.open_run(opened.path).folder.files.is_whole("skiplist.json")


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_report_gives_the_page(opened: Run, tmp_path: Path):
    assert opened.report(tmp_path / "page") == tmp_path / "page" / "index.html"
    assert (tmp_path / "page" / "index.html").is_file()


def test_it_shows_its_verdict_as_text_and_in_a_notebook(opened: Run):
    assert repr(opened) == f"Run({str(opened.path)!r}): {opened.verdict}"
    shown = opened._repr_html_()
    worst = opened.layers.sort_values("sensitivity_kl", ascending=False)["layer"].iloc[0]
    assert opened.verdict in shown and worst in shown and str(opened.path) in shown


def test_what_a_notebook_shows_is_escaped(opened: Run):
    run = Run(opened.path, replace(opened.result, verdict="a < b & c", notes=("<script>",)))
    assert "a &lt; b &amp; c" in run._repr_html_() and "<script>" not in run._repr_html_()


def test_a_folder_without_a_scan_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="is no run folder"):
        qprobe.open_run(tmp_path)


@pytest.mark.slow
def test_a_scan_that_has_not_finished_has_no_list(tiny_folder: TinyFolder, tmp_path: Path):
    class Stop(Exception):
        pass

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "measure":
            raise Stop

    with pytest.raises(Stop):
        qprobe.scan(**options(tiny_folder("llama"), tmp_path / "run"), progress=progress)
    run = qprobe.open_run(tmp_path / "run")
    assert run.skiplist is None and "not finished" in run.verdict and "not finished" in run._repr_html_()
    with pytest.raises(RunError, match="has not finished"):
        _ = run.layers


@pytest.mark.slow
def test_a_scan_of_weights_alone_is_a_run_too(tiny_folder: TinyFolder, tmp_path: Path):
    run = qprobe.scan(str(tiny_folder("llama")), measures=["weight"], out=tmp_path / "run", device="cpu")
    again = qprobe.open_run(run.path)
    assert replace(again.result, peak_bytes=0) == replace(run.result, peak_bytes=0)
    assert "weight_nmse" in again._repr_html_()
