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
from qprobe.choosing.table import read_table, write_table
from qprobe.manifest import NEAREST, manifest_to_json, read_manifest, write_manifest
from qprobe.measure.store import read_scan
from qprobe.records import CodesFile
from qprobe.report.figures import spike_plot
from qprobe.report.write import kept_layers, page_of
from qprobe.scanning import scan
from tests.report.full_run import write_comparison, write_full_run
from tests.scan.asked import options

SCRIPT = "<script>alert(1)</script>"
CLOSING = "</script><img src=x onerror=alert(2)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MINUS = "\N{MINUS SIGN}"
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


def marked(page: Page, panel: str, how: str = "kept") -> set[int]:
    """Indices of the layers drawn in one chart as kept, or as in 16-bit `always`."""
    found = page.locator(f"svg[data-panel={panel}] path.{how}").evaluate_all(
        "all => all.map(p => p.dataset.layer)"
    )
    return {int(i) for i in found}


def boxes_of(page: Page, selector: str) -> list[tuple[float, float, float, float]]:
    """(left, right, top, bottom) of everything that `selector` finds, in pixels of the window."""
    found = page.locator(selector).evaluate_all(
        "all => all.map(t => t.getBoundingClientRect()).map(b => [b.left, b.right, b.top, b.bottom])"
    )
    return [tuple(box) for box in found]


def overlapping(boxes: list[tuple[float, float, float, float]]) -> list[tuple[int, int]]:
    """Pairs of boxes that share more than a rounding error of a pixel."""
    return [
        (i, i + 1 + k)
        for i, (left, right, top, bottom) in enumerate(boxes)
        for k, (l2, r2, t2, b2) in enumerate(boxes[i + 1 :])
        if min(right, r2) - max(left, l2) > 0.5 and min(bottom, b2) - max(top, t2) > 0.5
    ]


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
    always = {i for i, x in enumerate(read_scan(run).inventory.layers) if x.fixed}
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
    assert {"standard 4-bit", "by sensitivity (chosen)", "a published list"} == set(labels)
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


def only(folder: Path, *stages: str) -> Path:
    """The run `folder` as if just these stages had been measured, and chosen nothing."""
    for file in (folder / "units").iterdir():
        if not file.name.startswith(tuple(f"{stage}-" for stage in stages)):
            file.unlink()
    for name in ("frontier.csv", "skiplist.json", "ranks.csv", "samples.json", "layers.csv"):
        (folder / name).unlink()
    return folder


def test_a_model_without_a_head_leaves_its_parts_out_and_says_so(opened: Open, tmp_path: Path):
    page = opened(page_file(only(write_full_run(tmp_path / "run"), "weights", "outputs")))
    assert page.locator("svg.panel").count() == 4
    assert page.locator("#missing").inner_text() == "Not measured in this run, so left out: sensitivity."
    assert "no sensitivity was measured" in page.locator("#buys").inner_text()
    assert "No KL was measured" in page.locator("#frontier").inner_text()
    assert "Not compared yet" in page.locator("#answers").inner_text()
    assert page.locator("#verdict").inner_text() == "No skip-list was chosen in this run."


def test_a_scan_of_the_weights_alone_shows_its_list_and_what_is_missing(opened: Open, tmp_path: Path):
    folder = only(write_full_run(tmp_path / "run"), "weights")
    write_table(folder)
    write_manifest(folder / "skiplist.json", select(folder, "+10%", by="weight_nmse"))
    page = opened(page_file(folder))
    assert page.locator("svg.panel").evaluate_all("all => all.map(s => s.dataset.panel)") == ["weight_nmse"]
    missing = "activation error, activation peak, propagated error, sensitivity"
    assert missing in page.locator("#missing").inner_text()
    assert page.locator("#verdict").inner_text().startswith("No KL was measured on held-out samples")
    assert "not measured" in page.locator("#buys").inner_text() and "NaN" not in page.content()
    assert len(boxes_of(page, "#rows thead th")) == 7  # weight error and its largest, and what is no measure
    page.locator("#charts").focus()
    page.keyboard.press("Home")
    assert page.locator("#detail img").count() == 0 and "weight error" in page.locator("#detail").inner_text()
    figure = spike_plot(read_table(folder), kept_layers(folder, read_scan(folder)), "a model")
    assert len(figure.axes) == 1 and missing in figure.legends[0].get_title().get_text()


def test_a_run_not_yet_finished_shows_what_it_has(opened: Open, tmp_path: Path):
    folder = only(write_full_run(tmp_path / "run"), "weights", "outputs")
    text = (folder / "scan.json").read_text()
    (folder / "scan.json").write_text(text.replace('"finished"', '"running"'))
    page = opened(page_file(folder))
    assert "not finished" in page.locator("#missing").inner_text()
    assert "not finished" in page.locator("#notes").inner_text()
    assert page.locator("svg.panel").count() == 4 and page.locator("#rows tbody tr").count() == 30


def test_the_page_that_a_scan_writes_last_does_not_call_it_unfinished(opened: Open, tmp_path: Path):
    folder = write_full_run(tmp_path / "run")
    text = (folder / "scan.json").read_text()
    (folder / "scan.json").write_text(text.replace('"finished"', '"running"'))
    assert "not finished" not in opened(page_file(folder)).locator("#method").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (400, "light")])
def test_600_layers_fit_the_window_and_8_megabytes(opened: Open, large: Path, width: int, scheme: str):
    assert large.stat().st_size < 8e6
    page = opened(large, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = boxes_of(page, "svg[data-panel=weight_nmse] text.spike")
    assert boxes and all(0 <= left and right <= width for left, right, _, _ in boxes)
    assert not overlapping(boxes)


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
