"""The page in a browser that fails on any console message or network request."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.report.full_run import write_comparison, write_full_run
from tests.report.pages import Open, page_file

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
        context.set_default_timeout(60_000)  # ms, on a busy machine
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


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of 600 layers."""
    return page_file(write_full_run(tmp_path_factory.mktemp("large") / "run", 600, 12))


@pytest.fixture
def page(opened: Open, run: Path) -> Page:
    return opened(run / "index.html")
