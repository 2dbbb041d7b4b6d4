"""The report of a run folder: which files, and that the same run gives the same bytes."""

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from qprobe.errors import RunError
from qprobe.report.figures import Kept, spike_plot
from qprobe.report.page import page_html, script_json
from qprobe.report.write import kept_layers, write_report
from qprobe.runs.folder import RunFolder
from tests.report.full_run import write_full_run, write_llama_11b
from tests.report.runs import write_run
from tests.timed import least

SPIKES = {3: 50.0, 17: 80.0}
ROOT = Path(__file__).parents[2]
IMAGES = ["spikes.png", "spikes.svg", "spikes-column.png", "spikes-column.svg"]
FRONTIER = "budget_bytes,predicted_kl,measured_kl,measured_kl_se,candidate\n1000,0.2,0.3,0.01,sensitivity\n"


@pytest.mark.slow
def test_the_pictures_lie_in_the_run_folder_and_are_the_same_bytes_each_time(tmp_path: Path):
    write_run(tmp_path, spikes=SPIKES)
    files = {file.name: file for file in write_report(tmp_path)}
    assert set(files) == {"index.html", *IMAGES} and {f.parent for f in files.values()} == {
        tmp_path / "report"
    }
    assert files["spikes.png"].read_bytes().startswith(b"\x89PNG\r\n")
    assert b"<svg" in files["spikes-column.svg"].read_bytes()
    again = write_report(tmp_path, tmp_path / "again")
    assert [f.read_bytes() for f in files.values()] == [f.read_bytes() for f in again]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_measured_frontier_is_drawn(tmp_path: Path):
    write_run(tmp_path)
    (tmp_path / "frontier.csv").write_text(FRONTIER)
    assert [f.name for f in write_report(tmp_path)] == ["index.html", *IMAGES, "frontier.png"]


@pytest.mark.slow
@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"", FRONTIER.encode()[:20]])
def test_a_damaged_frontier_is_refused(tmp_path: Path, undrawn: None, data: bytes):
    write_run(tmp_path, spikes=SPIKES)
    (tmp_path / "frontier.csv").write_bytes(data)
    with pytest.raises(RunError, match=r"frontier\.csv is damaged .*Run the scan again"):
        write_report(tmp_path)


def test_the_kept_layers_are_those_of_the_manifest(tmp_path: Path):
    write_run(tmp_path, spikes=SPIKES)
    manifest = json.loads((tmp_path / "skiplist.json").read_text())
    kept = kept_layers(RunFolder(tmp_path), RunFolder(tmp_path).scan)
    assert kept.in_16bit == set(manifest["skip_modules"]) and len(kept.chosen) > 1
    assert kept.always == {"lm_head"} and "lm_head" not in kept.chosen
    (tmp_path / "skiplist.json").unlink()
    assert kept_layers(RunFolder(tmp_path), RunFolder(tmp_path).scan) == Kept(
        frozenset(), frozenset({"lm_head"})
    )


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match=r"scan\.json"):
        write_report(tmp_path)


def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path):
    write_run(tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match="another --out"):
        write_report(tmp_path, tmp_path / "taken")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_another_run_is_drawn_beside_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path / "a", spikes=SPIKES)
    write_run(tmp_path / "b")
    names = []
    monkeypatch.setattr("qprobe.report.write.against_plot", lambda *sides: names.extend(sides))
    files = write_report(tmp_path / "a", tmp_path / "out", tmp_path / "b")
    assert [f.name for f in files[-2:]] == ["against.png", "against.svg"]
    assert [side.name for side in names[:2]] == [f"{run}: owner/model, nf4" for run in "ab"]
    assert names[2] == "a against b"
    with pytest.raises(RunError, match="missing is no run folder: it does not exist"):
        write_report(tmp_path / "a", against=tmp_path / "missing")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_run_of_another_model_is_not_drawn_beside_this_one(tmp_path: Path):
    for run in "ab":
        write_run(tmp_path / run)
    scan = json.loads((tmp_path / "b" / "scan.json").read_text())
    scan["model"]["id"], scan["spec"]["weights"] = "other/model", "other"
    (tmp_path / "b" / "scan.json").write_text(json.dumps(scan))
    with pytest.raises(RunError, match=r"owner/model \(Mllama.* other/model \(Mllama"):
        write_report(tmp_path / "a", against=tmp_path / "b")


@pytest.mark.slow
def test_names_with_dollars_are_drawn_as_they_are_and_no_path_is(tmp_path: Path):
    # Between two dollars matplotlib would read a formula, and fail on this one.
    for run in ("x$y_$z", "b"):
        write_run(tmp_path / run)
        (tmp_path / run / "frontier.csv").write_text(FRONTIER)
        scan = json.loads((tmp_path / run / "scan.json").read_text())
        scan["model"]["id"] = "a$b_$c"
        (tmp_path / run / "scan.json").write_text(json.dumps(scan))
    files = {f.name: f for f in write_report(tmp_path / "x$y_$z", against=tmp_path / "b")}
    assert "frontier.png" in files
    spikes, against = (files[f"{name}.svg"].read_text() for name in ("spikes", "against"))
    assert "a$b_$c in nf4" in spikes
    assert "x$y_$z against b" in against and "x$y_$z: a$b_$c, nf4" in against
    assert str(tmp_path) not in against and r"\$" not in against


@pytest.mark.slow
def test_600_layers_take_less_than_10_seconds_of_processor_time_and_no_torch(tmp_path: Path):
    write_full_run(tmp_path, 600, 24)
    code = (
        "import sys; from qprobe.cli import main\n"
        f"main(['report', {str(tmp_path)!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    assert least(lambda: subprocess.run(command, check=True, capture_output=True), 10, of_children=True) < 10


@pytest.mark.slow
def test_the_522_layers_of_llama_11b_draw_with_towers_spikes_and_marks_in_sight(tmp_path: Path):
    write_llama_11b(tmp_path)
    scan, table = RunFolder(tmp_path).scan, RunFolder(tmp_path).table
    kept = kept_layers(RunFolder(tmp_path), scan)
    figure = spike_plot(table, kept, "a model")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert len(table) == 522 and len(figure.axes) == 5
    named = {t.get_text(): t for t in figure.axes[0].texts if t.get_gid() == "tower-name"}
    assert set(named) == {"vision", "language, cross-attention"}
    for ax in figure.axes:
        spikes = [t for t in ax.texts if t.get_gid() == "spike"]
        boxes = [t.get_window_extent(renderer) for t in (*spikes, *named.values())]
        assert len(spikes) >= 8 and not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        inside = ax.get_window_extent()
        assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 + 1 for box in boxes)
        for line in ax.lines:  # marks of the first and the last layer stand within the axes in full
            half = 0.7 * line.get_markersize() * figure.dpi / 72 if line.get_marker() != "None" else 0
            if half and len(line.get_xdata()) and ":" in str(line.get_gid()):
                x = ax.transData.transform(line.get_xydata())[:, 0]
                assert inside.x0 <= x.min() - half and x.max() + half <= inside.x1


def test_nothing_in_the_page_can_end_its_script():
    text = script_json({"</script>": ["<!--", "&", "\u2028", "\ud800"]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"</script>": ["<!--", "&", "\u2028", "?"]}


def test_a_placeholder_in_the_data_stays_what_it_is():
    page = page_html({"model": "{{script}} {{title}}"}, "a & b")
    assert page.count("{{script}} {{title}}") == 1 and "<title>a &amp; b</title>" in page


def test_every_picture_of_the_readme_is_one_that_make_figures_draws():
    pictures = [Path(x) for x in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())]
    (models,) = re.findall(r"^\tfor model in ([a-z -]+); do", (ROOT / "Makefile").read_text(), re.MULTILINE)
    folders = {Path("reports") / model for model in models.split()}
    assert pictures and all((ROOT / x).is_file() and x.parent in folders for x in pictures)
    assert {x.name for x in pictures} <= {*IMAGES, "frontier.png"}
    for folder in folders:  # each sample report begins with the command that made it
        assert (ROOT / folder / "README.md").read_text().split("\n\n")[1].startswith("    qprobe scan")
