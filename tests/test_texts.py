"""README.md and CONTRIBUTING.md: what they name is there, and the house is drawn as it is built."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from qprobe.cli import main

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAYERS, WITHOUT_TORCH, *_ = PROJECT["tool"]["importlinter"]["contracts"]


def drawn_rooms() -> list[tuple[str, bool]]:
    """(room, whether it may import torch) of each line of the picture, from top to bottom."""
    picture = CONTRIBUTING.split("## The house")[1].split("\n### ")[0]
    lines = [line.strip() for line in picture.splitlines() if line.startswith("    ")]
    # A line may name two files that stand side by side: "records.py, options.py".
    return [
        (re.sub(r"/|\.py", "", name), re.match(r".*(/|\.py) +torch", line) is not None)
        for line in lines
        for name in re.findall(r"^\w+/|\w+\.py(?=,? )", line.split("  ")[0] + " ")
    ]


def test_the_rooms_are_drawn_in_the_order_of_imports():
    assert [f"qprobe.{room}" for room, _ in drawn_rooms()] == LAYERS["layers"]


def test_the_rooms_with_torch_are_marked():
    marked = {f"qprobe.{room}" for room, has_torch in drawn_rooms() if has_torch}
    assert marked == set(LAYERS["layers"]) - set(WITHOUT_TORCH["source_modules"])


def named_files(text: str) -> set[str]:
    """Paths of files between backticks; NAME, COMMAND and * stand for any."""
    found = re.findall(r"`([\w./*-]+/[\w.*-]+\.(?:py|js|json|md))`", text)
    return {re.sub(r"\b(SHORT-NAME|NAME|COMMAND)\b", "*", path) for path in found if "RUN" not in path}


@pytest.mark.parametrize("path", sorted(named_files(CONTRIBUTING)))
def test_a_file_that_contributing_names_is_there(path: str):
    homes = (ROOT, ROOT / "qprobe", ROOT / "qprobe" / "report")
    assert any(next(home.glob(path), None) for home in homes)


def test_functions_that_contributing_names_are_there():
    for test in re.findall(r"`(test_\w+)`", CONTRIBUTING):
        assert any(f"def {test}(" in x.read_text() for x in (ROOT / "tests").rglob("test_*.py")), test


def test_links_lead_somewhere():
    for text in (README, CONTRIBUTING):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (ROOT / target).exists(), target


def test_readme_shows_every_command_and_no_other():
    shown = set(re.findall(r"`qprobe (\w+)", README.split("\n## Commands")[1].split("\n## ")[0]))
    assert shown == set(main.commands)


def test_readme_has_at_most_250_lines():
    assert len(README.splitlines()) <= 250
