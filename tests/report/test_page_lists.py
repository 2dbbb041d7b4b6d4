"""The page's lists, budgets and answers, and what it says of missing parts, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page

from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import NEAREST
from qprobe.manifest.write import manifest_to_json, write_manifest
from qprobe.records import CodesFile, Score
from qprobe.report.figures import spike_plot
from qprobe.report.write import kept_layers
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import write_table
from qprobe.runs.notes import Ended
from qprobe.runs.scored import scored
from qprobe.selection.select import select
from tests.report.full_run import write_comparison, write_full_run
from tests.report.pages import (
    Open,
    boxes_of,
    downloaded,
    marked,
    move_slider,
    names,
    page_file,
)

SCRIPT = "<script>alert(1)</script>"
CLOSING = "</script><img src=x onerror=alert(2)>"


@pytest.mark.slow
def test_beside_calibrated_weights_standard_4bit_is_the_list_that_rounds_to_nearest(
    opened: Open, tmp_path: Path
):
    folder = write_full_run(tmp_path / "run", codes=CodesFile("codes.safetensors", "a" * 64))
    manifest = json.loads((folder / "skiplist.json").read_text())
    nothing = manifest["compared"][0]
    manifest["compared"].append({**nothing, "name": NEAREST, "kl": 0.9, "kl_se": 0.05})
    manifest["quality"]["kl_standard_4bit"] = 0.9
    (folder / "skiplist.json").write_text(json.dumps(manifest))
    page = opened(page_file(folder))
    said = "Calibrated 4-bit costs a KL of 0.200 ± 0.010 nats per answer token (standard 4-bit 0.900 ± 0.050)"
    assert page.locator("#verdict").inner_text().startswith(said)
    labels = page.locator("#frontier text.list").all_text_contents()
    assert {"calibrated 4-bit", "standard 4-bit"} <= set(labels)


@pytest.mark.slow
def test_the_slider_shows_the_list_bytes_and_kl_of_each_budget(page: Page, run: Path):
    last = int(page.locator("#slider").get_attribute("max"))
    sizes = []
    for position in range(last + 1):
        move_slider(page, position)
        state = page.evaluate("({total: here().total_bytes, kept: [...here().kept]})")
        sizes.append(state["total"])
        assert f"{state['total']:,} bytes" in page.locator("#buys").inner_text()
        assert page.locator("#kept li").count() == len(state["kept"]) + 1  # and lm_head
        layers = {x.name: i for i, x in enumerate(read_manifest(run / "skiplist.json").layers)}
        assert marked(page, "weight_nmse") == {layers[name] for name in state["kept"]}
        assert marked(page, "weight_nmse", "always") == {layers["lm_head"]}
    assert sizes == sorted(sizes) and len(set(sizes)) > 10


@pytest.mark.slow
def test_each_budgets_manifest_is_what_select_gives(page: Page, run: Path, tmp_path: Path):
    last = int(page.locator("#slider").get_attribute("max"))
    for position in (0, 3, last // 2, last):
        move_slider(page, position)
        mine = read_manifest(downloaded(page, tmp_path / f"{position}.json"))
        if page.evaluate("Boolean(here().isChosen)"):
            assert mine == read_manifest(run / "skiplist.json")
            continue
        wanted = manifest_to_json(select(run, mine.budget.requested))
        assert json.loads(json.dumps(manifest_to_json(mine))) == json.loads(json.dumps(wanted))


@pytest.mark.slow
def test_manifests_of_calibrated_weights_name_their_file(opened: Open, tmp_path: Path):
    folder = write_full_run(tmp_path / "run", codes=CodesFile("codes.safetensors", "a" * 64))
    page = opened(page_file(folder))
    move_slider(page, 3)
    assert "put it beside codes.safetensors" in page.locator("#budget").inner_text()
    mine = read_manifest(downloaded(page, tmp_path / "mine.json"))
    assert not page.evaluate("Boolean(here().isChosen)")
    assert mine.codes == CodesFile("codes.safetensors", "a" * 64) and mine.format.is_calibrated
    assert mine.layers == select(folder, mine.budget.requested).layers


def test_the_runs_own_list_is_where_the_slider_begins(page: Page, run: Path, tmp_path: Path):
    text = page.locator("#buys").inner_text()
    assert "the one this run chose" in text and "on 8 held-out samples" in text
    assert downloaded(page, tmp_path / "mine.json").name == "mine.json"
    assert read_manifest(tmp_path / "mine.json") == read_manifest(run / "skiplist.json")


def test_the_frontier_shows_the_lists_that_were_compared(page: Page):
    labels = page.locator("#frontier text.list").all_text_contents()
    assert {"standard 4-bit", "by sensitivity (chosen)", "a published list"} == set(labels)
    assert (
        page.locator("#frontier path.predicted").count() == 1 and page.locator("#frontier .now").count() == 1
    )


def test_answers_and_method_are_told(page: Page):
    answers = page.locator("#answers-body").inner_text()
    assert "9 bar" in answers and "the models answer alike on 1" in answers and "0.250 ± 0.020" in answers
    assert (
        "exact, 2 of 3 samples, paired by sample: nf4 against 16-bit: \N{MINUS SIGN}50 ± 50 points (no "
        "difference found)" in answers
    )
    assert "dynamic against 16-bit: 0 ± 0 points (no difference found)" in answers and "100 ± 0 %" in answers
    method = page.locator("#method").inner_text()
    assert (
        "torch 2.13.0" in method
        and "qprobe scan --model owner/model" in method
        and "x.txt: skipped" in method
    )
    assert "qprobe scan --model owner/model --budget +10%" in page.locator("header").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [SCRIPT, CLOSING])
def test_markup_in_names_is_text_everywhere(opened: Open, tmp_path: Path, name: str):
    folder = write_full_run(tmp_path / "run", names={3: f"a.{name}.q_proj", 20: name}, model=name)
    write_comparison(folder, prompt=name)
    page = opened(page_file(folder))
    assert f"a.{name}.q_proj" in names(page) and name in names(page)
    page.locator("#charts").focus()
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert f"a.{name}.q_proj" in page.locator("#detail").inner_text()
    assert name in page.locator("h1").inner_text() and page.title().startswith(name)
    assert name in page.locator("#answers").inner_text() and name in page.locator("#method").inner_text()
    assert page.locator("script").count() == 2 and page.locator("img[src=x]").count() == 0


@pytest.mark.slow
def test_the_metric_of_a_scan_is_shown_and_the_line_of_python_that_made_it(opened: Open, tmp_path: Path):
    folder = write_full_run(tmp_path / "run")
    right, wrong = Score(1.0, 1), Score(0.0, 1)
    found = scored(
        "exact", True, {"16-bit": [right, right], "nf4": [wrong, right], "dynamic": [right, right]}
    )
    RunFolder(folder).notes.put("end", Ended({}, None, (), "", found))
    manifest = json.loads((folder / "skiplist.json").read_text())
    manifest["made_by"]["command"] = "qprobe.scan(model, processor=processor)  # model: a loaded Llama"
    (folder / "skiplist.json").write_text(json.dumps(manifest))
    page = opened(page_file(folder))
    said = page.locator("#answers").inner_text()
    assert "with the list that it chose: 16-bit 100 ± 0 %, nf4 50 ± 50 %, dynamic 100 ± 0 %." in said
    assert "dynamic against nf4: +50 ± 50 points (no difference found)" in said and "Not compared yet" in said
    assert page.locator("#command").text_content() == manifest["made_by"]["command"]


def only(folder: Path, *stages: str) -> Path:
    """The run `folder` as if just these stages had been measured, and chosen nothing."""
    for file in (folder / "units").iterdir():
        if not file.name.startswith(tuple(f"{stage}-" for stage in stages)):
            file.unlink()
    for name in ("frontier.csv", "skiplist.json", "ranks.csv", "samples.json", "layers.csv"):
        (folder / name).unlink()
    return folder


@pytest.mark.slow
def test_a_model_without_a_head_leaves_its_parts_out_and_says_so(opened: Open, tmp_path: Path):
    page = opened(page_file(only(write_full_run(tmp_path / "run"), "weights", "outputs")))
    assert page.locator("svg.panel").count() == 4
    assert page.locator("#missing").inner_text() == "Not measured in this run, so left out: sensitivity."
    assert "no sensitivity was measured" in page.locator("#buys").inner_text()
    assert "No KL was measured" in page.locator("#frontier").inner_text()
    assert "Not compared yet" in page.locator("#answers").inner_text()
    assert page.locator("#verdict").inner_text() == "No skip-list was chosen in this run."


@pytest.mark.slow
def test_a_scan_of_the_weights_alone_shows_its_list_and_what_is_missing(opened: Open, tmp_path: Path):
    folder = only(write_full_run(tmp_path / "run"), "weights")
    write_table(RunFolder(folder))
    write_manifest(folder / "skiplist.json", select(folder, "+10%", by="weight_nmse"))
    page = opened(page_file(folder))
    assert page.locator("svg.panel").evaluate_all("all => all.map(s => s.dataset.panel)") == ["weight_nmse"]
    missing = "activation error, largest activation error, propagated error, sensitivity"
    assert missing in page.locator("#missing").inner_text()
    assert page.locator("#verdict").inner_text().startswith("No KL was measured on held-out samples")
    assert "not measured" in page.locator("#buys").inner_text() and "NaN" not in page.content()
    assert len(boxes_of(page, "#rows thead th")) == 7  # weight error and its largest, and what is no measure
    page.locator("#charts").focus()
    page.keyboard.press("Home")
    assert page.locator("#detail img").count() == 0 and "weight error" in page.locator("#detail").inner_text()
    figure = spike_plot(
        RunFolder(folder).table, kept_layers(RunFolder(folder), RunFolder(folder).scan), "a model"
    )
    assert len(figure.axes) == 1 and missing in figure.legends[0].get_title().get_text()


@pytest.mark.slow
def test_a_run_not_yet_finished_shows_what_it_has(opened: Open, tmp_path: Path):
    folder = only(write_full_run(tmp_path / "run"), "weights", "outputs")
    (folder / "notes" / "end.json").unlink()
    page = opened(page_file(folder))
    assert "not finished" in page.locator("#missing").inner_text()
    assert "not finished" in page.locator("#notes").inner_text()
    assert page.locator("svg.panel").count() == 4 and page.locator("#rows tbody tr").count() == 30


@pytest.mark.slow
def test_the_page_that_a_scan_writes_last_does_not_call_it_unfinished(opened: Open, tmp_path: Path):
    folder = write_full_run(tmp_path / "run")
    (folder / "notes" / "end.json").unlink()
    assert "not finished" not in opened(page_file(folder)).locator("#method").inner_text()
