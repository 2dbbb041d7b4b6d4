"""Fixtures that every test may use. Nothing here reaches a network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before transformers is imported: a test that would reach for the hub must fail at once, not hang.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tests import tiny


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_unthreaded() -> None:
    """No progress bar for each of the hundreds of tiny models, and one thread a test process.

    Tiny matrices gain nothing from threads, but on a busy machine they wait for each other: twenty
    times slower with two threads than with one.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(name)`: that model's folder, written once a session. Tests must not change it."""
    root = tmp_path_factory.mktemp("tiny")
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = tiny.write(name, root / name)
        return written[name]

    return folder
