"""The page in a real browser, from a file: it says what the run says, by mouse and keyboard, and is safe.

Every test fails on any console message or network request (`opened` below). Without a chromium they are
skipped, except in CI, where `make browser` installs one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from qprobe.build.load import load_dynamic_4bit
from qprobe.choosing import select
from qprobe.choosing.table import read_table
from qprobe.manifest import manifest_to_json, read_manifest
from qprobe.records import CodesFile
from qprobe.report.write import page_of
from qprobe.scanning import scan
from tests.report.full_run import write_comparison, write_full_run
from tests.scan.asked import options

SCRIPT = "<script>alert(1)</script>"
CLOSING = "</script><img src=x onerror=alert(2)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        assert os.environ.get("CI") is None, "CI has no chromium; `make browser` installs it as root"
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """`opened(file, width=1280)`: the page, watched for messages and requests until the test ends."""
    wrong: list[str] = []
    contexts = []

    def open_page(file: Path, width: int = 1280, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(8000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append("a dialog opened"), dialog.dismiss()))
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or wrong.append(r.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 layers with a comparison and its report. Tests must not change it."""
    folder = write_full_run(tmp_path_factory.mktemp("page") / "my run")
    write_comparison(folder)
    page_file(folder)
    return folder


def page_file(folder: Path) -> Path:
    """The page of the run `folder`, without the pictures, which take longer."""
    file = folder / "index.html"
    file.write_bytes(page_of(folder))
    return file


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of 600 layers."""
    return page_file(write_full_run(tmp_path_factory.mktemp("large") / "run", 600, 12))


@pytest.fixture
def page(opened: Open, run: Path) -> Page:
    return opened(run / "index.html")


def names(page: Page) -> list[str]:
    """The layers of the table from top to bottom, by full name."""
    return page.locator("#rows tbody th button").evaluate_all("all => all.map(b => b.title)")


def marked(page: Page, panel: str) -> set[int]:
    """Indices of the layers drawn as kept in one chart."""
    found = page.locator(f"svg[data-panel={panel}] path.kept").evaluate_all(
        "all => all.map(p => p.dataset.layer)"
    )
    return {int(i) for i in found}


def downloaded(page: Page, to: Path) -> Path:
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(to)
    return to


def move_slider(page: Page, position: int) -> None:
    page.locator("#slider").fill(str(position))


def test_every_layer_is_a_point_of_every_chart_and_kept_ones_are_marked(page: Page, run: Path):
    manifest = read_manifest(run / "skiplist.json")
    kept = {i for i, x in enumerate(manifest.layers) if x.precision == "bf16"}
    panels = page.locator("svg.panel").evaluate_all("all => all.map(s => s.dataset.panel)")
    assert panels == [
        "weight_nmse",
        "activation_nmse",
        "activation_peak",
        "propagated_nmse",
        "sensitivity_kl",
    ]
    for panel in panels:
        fixed = {len(manifest.layers) - 1} if panel == "sensitivity_kl" else set()  # lm_head has none
        points = page.locator(f"svg[data-panel={panel}] [data-layer]").count()
        assert points == len(manifest.layers) - len(fixed) and marked(page, panel) == kept - fixed
    bands = page.locator("svg[data-panel=weight_nmse] rect[data-tower]")
    assert bands.first.get_attribute("data-tower") == "vision"


def test_pointing_at_a_layer_shows_its_figures_and_worst_token(page: Page, run: Path):
    row = read_table(run).iloc[14]  # text; its worst token is " 7" of the answer
    page.locator("svg[data-panel=activation_nmse] [data-layer='14']").hover()
    detail = page.locator("#detail")
    assert row["layer"] in detail.inner_text()
    assert f"{row['activation_peak']:.3g}" in detail.inner_text()
    assert detail.locator("mark").inner_text().strip() == "7" and "The dial shows 7." in detail.inner_text()
    assert detail.locator("img").get_attribute("src").startswith("data:image/jpeg;base64,")
    assert detail.locator("img").evaluate("image => image.naturalWidth") == 140


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
    order = list(read_table(run)["layer"])
    charts = page.locator("#charts")
    charts.focus()
    for key, layer in (("Home", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("End", len(order) - 1)):
        page.keyboard.press(key)
        assert order[layer] in page.locator("#detail").inner_text()
    page.locator("#slider").focus()
    before = page.locator("#buys").inner_text()
    page.keyboard.press("Home")
    assert page.locator("#buys").inner_text() != before
    assert "+0.0 %, 0 layers kept" in str(page.locator("#slider").get_attribute("aria-valuetext"))


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
    table = read_table(run)
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
        assert marked(page, "weight_nmse") == {layers[name] for name in (*state["kept"], "lm_head")}
    assert sizes == sorted(sizes) and len(set(sizes)) > 10


def test_each_budgets_manifest_is_what_select_gives(page: Page, run: Path, tmp_path: Path):
    last = int(page.locator("#slider").get_attribute("max"))
    for position in (0, 3, last // 2, last):
        move_slider(page, position)
        mine = read_manifest(downloaded(page, tmp_path / f"{position}.json"))
        if page.evaluate("Boolean(here().isChosen)"):
            assert mine == read_manifest(run / "skiplist.json")
            continue
        wanted = manifest_to_json(select(run, mine.budget.requested))
        wanted["made_by"]["time"] = mine.made_by.time
        assert json.loads(json.dumps(manifest_to_json(mine))) == json.loads(json.dumps(wanted))


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
    assert {"standard 4-bit", "by sensitivity_kl (chosen)", "a published list"} == set(labels)
    assert (
        page.locator("#frontier path.predicted").count() == 1 and page.locator("#frontier .now").count() == 1
    )


def test_answers_and_method_are_told(page: Page):
    answers = page.locator("#answers-body").inner_text()
    assert "9 bar" in answers and "the models answer alike on 1" in answers and "0.250 ± 0.020" in answers
    method = page.locator("#method").inner_text()
    assert (
        "torch 2.13.0" in method
        and "qprobe scan --model owner/model" in method
        and "x.txt: skipped" in method
    )
    assert "qprobe scan --model owner/model --budget +10%" in page.locator("header").inner_text()


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


def test_a_run_without_kl_leaves_its_parts_out_and_says_so(opened: Open, tmp_path: Path):
    folder = write_full_run(tmp_path / "run")
    for stage in ("kl", "sensitivity", "alone", "heldout"):
        for file in (folder / "units").glob(f"{stage}-*"):
            file.unlink()
    for file in ("frontier.csv", "skiplist.json", "ranks.csv", "samples.json", "layers.csv"):
        (folder / file).unlink()
    page = opened(page_file(folder))
    assert page.locator("svg.panel").count() == 4
    assert page.locator("#missing").inner_text() == "Not measured in this run, so left out: sensitivity."
    assert "no sensitivity was measured" in page.locator("#buys").inner_text()
    assert "No KL was measured" in page.locator("#frontier").inner_text()
    assert "Not compared yet" in page.locator("#answers").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (400, "light")])
def test_600_layers_fit_the_window_and_8_megabytes(opened: Open, large: Path, width: int, scheme: str):
    assert large.stat().st_size < 8e6
    page = opened(large, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.locator("svg[data-panel=weight_nmse] text.spike").evaluate_all(
        "all => all.map(t => t.getBoundingClientRect()).map(b => [b.left, b.right, b.top, b.bottom])"
    )
    assert boxes and all(0 <= left and right <= width for left, right, _, _ in boxes)
    for i, (left, right, top, bottom) in enumerate(boxes):
        for other in boxes[i + 1 :]:
            assert right <= other[0] or other[1] <= left or bottom <= other[2] + 3 or other[3] <= top + 3


def test_in_print_everything_is_on_paper(page: Page):
    page.emulate_media(media="print")
    assert not page.locator("#filters").is_visible() and page.locator("#rows tbody tr").last.is_visible()
    assert page.locator("#table .scroll").evaluate("node => node.scrollHeight <= node.clientHeight + 1")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_downloaded_manifest_builds_the_model(
    opened: Open, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.scanning.write_report", lambda _folder: [])
    model = tiny_folder("mllama")
    found = scan(options(model, tmp_path / "run"))
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
