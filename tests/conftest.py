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
