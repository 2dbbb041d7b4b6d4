"""The page in a real browser, from a file: it says what the run says, by mouse and keyboard, and is safe.

Every test fails on any console message or network request (`opened` below). Without a chromium they are
skipped, except in CI, where `make browser` installs one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.manifest.read import read_manifest
from qprobe.runs.folder import RunFolder
from tests.report.full_run import write_full_run
from tests.report.pages import (
    MINUS,
    Open,
    boxes_of,
    downloaded,
    marked,
    move_slider,
    names,
    overlapping,
    page_file,
)
from tests.scanning.asked import options, scan


@pytest.mark.slow
def test_every_layer_is_a_point_of_every_chart_and_kept_ones_are_marked(page: Page, run: Path):
    manifest = read_manifest(run / "skiplist.json")
    kept = {i for i, x in enumerate(manifest.layers) if x.precision == "bf16"}
    always = {i for i, x in enumerate(RunFolder(run).scan.inventory.layers) if x.fixed}
    assert always == {len(manifest.layers) - 1}
    panels = page.locator("svg.panel").evaluate_all("all => all.map(s => s.dataset.panel)")
    assert panels == [
        "weight_nmse",
        "activation_nmse",
        "activation_peak",
        "propagated_nmse",
        "sensitivity_kl",
    ]
    for panel in panels:
        unmeasured = always if panel == "sensitivity_kl" else set()  # lm_head has none
        points = page.locator(f"svg[data-panel={panel}] [data-layer]").count()
        assert points == len(manifest.layers) - len(unmeasured)
        assert marked(page, panel) == kept - always
        assert marked(page, panel, "always") == always - unmeasured
    bands = page.locator("svg[data-panel=weight_nmse] rect[data-tower]")
    assert bands.first.get_attribute("data-tower") == "vision"


@pytest.mark.slow
def test_pointing_at_a_layer_shows_its_figures_and_worst_token(page: Page, run: Path):
    row = RunFolder(run).table.iloc[14]  # text; its worst token is " 7" of the answer
    page.locator("svg[data-panel=activation_nmse] [data-layer='14']").hover()
    detail = page.locator("#detail")
    assert row["layer"] in detail.inner_text()
    assert f"{row['activation_peak']:.3g}" in detail.inner_text()
    assert detail.locator("mark").inner_text().strip() == "7" and "The dial shows 7." in detail.inner_text()
    assert detail.locator("img").get_attribute("src").startswith("data:image/jpeg;base64,")
    assert detail.locator("img").evaluate("image => image.naturalWidth") == 140


def test_experts_of_a_fused_weight_are_listed_and_what_is_unknown_says_so(
    opened: Open, run: Path, tmp_path: Path
):
    html = (run / "index.html").read_text()
    before, data, after = re.split(
        r'(?<=type="application/json">)(.*?)(?=</script>)', html, maxsplit=1, flags=re.S
    )
    shown = json.loads(data)
    experts = {
        "tokens": [7, 0, 5],
        "worst": 2,
        "activation_nmse": [0.01, None, 0.03],
        "weight_nmse": [0.009] * 3,
    }
    shown["layers"][14]["experts"] = experts
    (tmp_path / "index.html").write_text(before + json.dumps(shown) + after)
    page = opened(tmp_path / "index.html")
    page.locator("svg[data-panel=activation_nmse] [data-layer='14']").hover()
    detail = page.locator("#detail")
    assert "3 experts" in detail.inner_text() and "1 of 3 read no token" in detail.inner_text()
    rows = [x.split() for x in detail.locator(".experts tbody tr").all_inner_texts()]
    assert rows == [["0", "7", "0.01", "0.009"], ["1", "0", "unknown", "0.009"], ["2", "5", "0.03", "0.009"]]
    assert detail.locator(".experts mark").inner_text() == "2"
    page.locator("svg[data-panel=activation_nmse] [data-layer='3']").hover()
    assert detail.locator(".experts").count() == 0


def test_a_worst_patch_is_marked_on_its_image(page: Page):
    page.locator("svg[data-panel=activation_nmse] [data-layer='3']").hover()
    text = page.locator("#detail").inner_text()
    assert "patch in row" in text or "class token" in text
    assert page.locator("#detail .mark").count() == (1 if "patch in row" in text else 0)


def test_a_click_holds_a_layer_until_escape(page: Page):
    page.locator("svg[data-panel=activation_nmse] [data-layer='3']").click()
    held = page.locator("#detail h3").first.inner_text()
    page.locator("svg[data-panel=activation_nmse] [data-layer='20']").hover()
    assert page.locator("#detail h3").first.inner_text() == held
    page.locator("#charts").press("Escape")
    page.locator("svg[data-panel=activation_nmse] [data-layer='14']").hover()
    assert page.locator("#detail h3").first.inner_text() != held


def test_the_keyboard_reaches_every_layer_and_budget(page: Page, run: Path):
    order = list(RunFolder(run).table["layer"])
    charts = page.locator("#charts")
    charts.focus()
    for key, layer in (("Home", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("End", len(order) - 1)):
        page.keyboard.press(key)
        assert order[layer] in page.locator("#detail").inner_text()
    page.locator("#slider").focus()
    before = page.locator("#buys").inner_text()
    page.keyboard.press("Home")
    assert page.locator("#buys").inner_text() != before
    assert "±0.0 %, 0 layers kept" in str(page.locator("#slider").get_attribute("aria-valuetext"))


def test_filters_apply_to_table_and_charts(page: Page):
    everything = names(page)
    page.select_option("#tower", "vision")
    assert (
        names(page) == [n for n in everything if "vision_model" in n]
        and page.locator("#shown").inner_text() == "10 of 30 layers"
    )
    page.select_option("#kind", "q_proj")
    page.fill("#text", "LAYERS.1 q_")
    assert names(page) == ["model.vision_model.transformer.layers.1.self_attn.q_proj"]
    assert page.locator("svg[data-panel=weight_nmse] [data-layer]:not(.out)").count() == 1
    page.click("button[type=reset]")
    expect(page.locator("#shown")).to_have_text("30 layers")
    assert names(page) == everything


def test_the_table_sorts_by_every_heading_both_ways(page: Page, run: Path):
    table = RunFolder(run).table
    assert names(page) == list(table["layer"])
    heading = page.get_by_role("columnheader", name="sensitivity")
    heading.get_by_role("button").click()
    falling = table.sort_values("sensitivity_kl", ascending=False, na_position="last", kind="stable")
    assert names(page) == list(falling["layer"]) and heading.get_attribute("aria-sort") == "descending"
    heading.get_by_role("button").click()
    assert (
        names(page)[:29] == list(falling["layer"])[:29][::-1] and names(page)[29] == "lm_head"
    )  # unmeasured last
    page.get_by_role("columnheader", name="layer").get_by_role("button").click()
    shown = page.locator("#rows tbody th button").all_inner_texts()
    assert shown == sorted(shown)


def test_the_whole_table_is_in_sight_on_a_desktop_and_in_reach_on_a_phone(opened: Open, run: Path):
    boxes = boxes_of(opened(run / "index.html"), "#rows thead th")
    assert len(boxes) == 12 and all(0 <= left and right <= 1280 for left, right, _, _ in boxes)
    phone = opened(run / "index.html", 400)
    phone.locator("#table .scroll").evaluate("node => { node.scrollLeft = node.scrollWidth }")
    (name,) = boxes_of(phone, "#rows tbody tr:first-child th")
    own = boxes_of(phone, "#rows tbody tr:first-child td:last-child")[0]
    (around,) = boxes_of(phone, "#table .scroll")
    assert 0 <= name[0] - around[0] <= 2 and name[1] <= own[0] and own[1] <= around[1] <= 400
    heading = phone.get_by_role("columnheader", name="sensitivity")
    heading.get_by_role("button").click()  # nothing lies on it
    assert heading.get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("width", [1280, 800, 400])
def test_no_label_of_a_chart_covers_another(opened: Open, width: int, run: Path):
    page = opened(run / "index.html", width)
    for chart in ("#frontier", *(f"svg[data-panel={x}]" for x in ("weight_nmse", "sensitivity_kl"))):
        boxes = boxes_of(page, f"{chart} text")
        assert len(boxes) > 3 and not overlapping(boxes), chart
        assert all(0 <= left and right <= width for left, right, _, _ in boxes)
    texts = page.locator("#frontier text.list").all_text_contents()
    ring, labels = boxes_of(page, "#frontier .now"), boxes_of(page, "#frontier text.list")
    assert len(texts) == 3 and not any((0, i) in overlapping([*ring, *labels]) for i in range(1, 4))


@pytest.mark.slow
def test_lists_without_room_for_their_names_are_named_below(opened: Open, tmp_path: Path):
    folder = write_full_run(tmp_path / "run")
    manifest = json.loads((folder / "skiplist.json").read_text())
    one = manifest["compared"][2]
    manifest["compared"] += [{**one, "name": f"list {i} that somebody published"} for i in range(60)]
    (folder / "skiplist.json").write_text(json.dumps(manifest))
    page = opened(page_file(folder), 400)
    boxes = boxes_of(page, "#frontier text.list")
    assert not overlapping(boxes)
    left = page.locator("#frontier-says").inner_text().partition("for want of room: ")[2].split("; ")
    assert len(left) + len(boxes) == 63 and left[-1] == "list 59 that somebody published."


def test_layers_that_standard_4bit_keeps_are_named_and_not_counted(page: Page, run: Path):
    kept = len(read_manifest(run / "skiplist.json").skip_modules) - 1
    said = f"{kept} layers of 30, besides lm_head, which standard 4-bit keeps as well"
    assert said in page.locator("#buys").inner_text()
    assert (
        f"The skip-list: {kept} layers, and what standard 4-bit keeps as well"
        in page.locator("#list").inner_text()
    )
    assert page.locator("#kept li").last.inner_text() == "lm_head (in standard 4-bit too)"
    assert f"with {kept} layers kept in 16-bit" in page.locator("#verdict").inner_text()


def test_differences_have_a_sign_of_their_own(page: Page):
    assert page.evaluate("[-0.09, -1e-9, 0.09].map((v) => signed(v, 1))") == [f"{MINUS}0.1", "±0.0", "+0.1"]
    assert page.evaluate("[-26000, 0, 26000].map(signedBytes)") == [f"{MINUS}25.39 KiB", "±0 B", "+25.39 KiB"]
    assert page.evaluate("[-0.5, -2.5e-7, 1e-5, 0].map(number)") == [
        f"{MINUS}0.5",
        f"{MINUS}2.5·10⁻⁷",
        "10⁻⁵",
        "0",
    ]
    move_slider(page, 0)
    assert "±0 B (±0.0 %)" in page.locator("#buys").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (400, "light")])
def test_600_layers_fit_the_window_and_8_megabytes(opened: Open, large: Path, width: int, scheme: str):
    assert large.stat().st_size < 8e6
    page = opened(large, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = boxes_of(page, "svg[data-panel=weight_nmse] text.spike")
    assert boxes and all(0 <= left and right <= width for left, right, _, _ in boxes)
    assert not overlapping(boxes)


@pytest.mark.slow
def test_in_print_everything_is_on_paper(page: Page):
    page.emulate_media(media="print")
    assert not page.locator("#filters").is_visible() and page.locator("#rows tbody tr").last.is_visible()
    assert page.locator("#table .scroll").evaluate("node => node.scrollHeight <= node.clientHeight + 1")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.slow
def test_a_downloaded_manifest_builds_the_model(
    opened: Open, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    model = tiny_folder("mllama")
    found = scan(**options(model, tmp_path / "run"))
    page = opened(page_file(found.run))
    middle = page.evaluate("POSITIONS.findIndex(p => !p.isChosen && p.kept.size > 2)")
    move_slider(page, middle)
    file = downloaded(page, tmp_path / "list.json")
    kept = set(page.evaluate("[...here().kept]"))
    built, _ = load_dynamic_4bit(file, str(model), "cpu")  # verifies every linear against the manifest
    assert kept and all(type(built.get_submodule(name)).__name__ == "Linear" for name in kept)
    detail = page.locator("#detail")
    page.locator("#charts").focus()
    page.keyboard.press("Home")
    assert detail.locator("img").count() == 1 and "Worst token" in detail.inner_text()
