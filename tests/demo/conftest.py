"""The demo's models and scenes, loaded once per session. Tests must not change the models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qprobe.demo.evaluate import greedy_answers
from qprobe.demo.folder import demo_folder
from qprobe.demo.outliers import write_outliers
from qprobe.demo.scenes import HELD_OUT_SEED, scenes
from qprobe.records import Sample


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="session")
def demo() -> Any:
    return load(demo_folder())


@pytest.fixture(scope="session")
def processor() -> Any:
    return AutoProcessor.from_pretrained(demo_folder())


@pytest.fixture(scope="session")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outliers(tmp_path_factory.mktemp("outliers"))


@pytest.fixture(scope="session")
def held_out() -> list[Sample]:
    return scenes(104, HELD_OUT_SEED)


def answers_of(model: Any, processor: Any, samples: list[Sample]) -> list[str]:
    """Greedy answers of a model whose weights are in 16-bit, computed in float32.

    Nine times faster than bf16 on processors that have no bf16 arithmetic; the weights are the same numbers.
    """
    return greedy_answers(copy.deepcopy(model).float(), processor, samples, batch=len(samples))


@pytest.fixture(scope="session")
def demo_answers(demo: Any, processor: Any, held_out: list[Sample]) -> list[str]:
    return answers_of(demo, processor, held_out)
