"""The report of a run folder: which files, and that the same run gives the same bytes."""

import json
from pathlib import Path

import pytest

from qprobe.errors import RunError
from qprobe.measure.store import read_scan
from qprobe.report.write import kept_layers, write_report
from tests.report.runs import write_run

SPIKES = {3: 50.0, 17: 80.0}
FRONTIER = "budget_bytes,predicted_kl,measured_kl,measured_kl_se,candidate\n1000,0.2,0.3,0.01,sensitivity\n"


def test_the_pictures_lie_in_the_run_folder(tmp_path: Path):
    write_run(tmp_path, spikes=SPIKES)
    png, svg = write_report(tmp_path)
    assert (png, svg) == (tmp_path / "report/spikes.png", tmp_path / "report/spikes.svg")
    assert png.read_bytes().startswith(b"\x89PNG\r\n") and b"<svg" in svg.read_bytes()


def test_the_same_run_gives_the_same_bytes(tmp_path: Path):
    write_run(tmp_path, spikes=SPIKES)
    first, second = write_report(tmp_path, tmp_path / "a"), write_report(tmp_path, tmp_path / "b")
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


def test_a_measured_frontier_is_drawn(tmp_path: Path):
    write_run(tmp_path)
    (tmp_path / "frontier.csv").write_text(FRONTIER)
    assert [f.name for f in write_report(tmp_path)] == ["spikes.png", "spikes.svg", "frontier.png"]


def test_the_kept_layers_are_those_of_the_manifest(tmp_path: Path):
    write_run(tmp_path, spikes=SPIKES)
    manifest = json.loads((tmp_path / "skiplist.json").read_text())
    kept = kept_layers(tmp_path, read_scan(tmp_path))
    assert kept == set(manifest["skip_modules"]) and "lm_head" in kept and len(kept) > 1
    (tmp_path / "skiplist.json").unlink()
    assert kept_layers(tmp_path, read_scan(tmp_path)) == {"lm_head"}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match=r"scan\.json"):
        write_report(tmp_path)


def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path):
    write_run(tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match="another --out"):
        write_report(tmp_path, tmp_path / "taken")
