"""Fixtures that every test may use. Nothing here reaches a network."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before transformers is imported: a test that would reach for the hub must fail at once, not hang.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is: tiny matrices gain nothing from threads, but on a busy machine they wait for each other,
# twenty times slower with two threads than with one.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

LONGEST = (
    "tests/scanning/resume/test_kills.py",
    "tests/test_notebooks.py",
    "tests/measure/test_memory_limit.py",
    "tests/scanning/resume/test_interrupted.py",
    "tests/scanning/resume/test_shards.py",
    "tests/checkpoint/test_quantize.py",
    "tests/training/test_finetune.py",
    "tests/test_wheel.py",
)
"""Files that take half a minute and more; they are begun first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first and quick ones last, so that no process waits for another one's file at the end."""
    files = [item.nodeid.partition("::")[0] for item in items]
    slow = {file for item, file in zip(items, files, strict=True) if item.get_closest_marker("slow")}

    def rank(file: str) -> int:
        if file in LONGEST:
            return LONGEST.index(file)
        return len(LONGEST) + (file not in slow)

    ranks = {id(item): rank(file) for item, file in zip(items, files, strict=True)}
    items.sort(key=lambda item: ranks[id(item)])


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    """No progress bar for each of the hundreds of tiny models; nothing where no test imports transformers."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(name)`: that model's folder, written once per session. Tests must not change it."""
    from tests import tiny  # which imports torch and transformers: six seconds that most rooms' tests save

    root = tmp_path_factory.mktemp("tiny")
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = tiny.write(name, root / name)
        return written[name]

    return folder


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`mixture(name)`: the folder of that tiny mixture of experts, as `tiny_folder`."""
    from tests import mixtures, tiny

    root = tmp_path_factory.mktemp("mixtures")
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = tiny.write_recipe(mixtures.RECIPES[name], name, root / name)
        return written[name]

    return folder
