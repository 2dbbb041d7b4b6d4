"""Fixtures that every test may use. Nothing here reaches a network."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Generator
from functools import cache, partial
from pathlib import Path

# Before transformers is imported: a test that would reach for the hub must fail at once, not hang.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is: tiny matrices gain nothing from threads, but on a busy machine they wait for each other,
# twenty times slower with two threads than with one.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing here is compiled, but bitsandbytes asks for it, and torch imports its compiler: 2 s per process.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import pytest

from tests.once import once

LONGEST = (
    "tests/scanning/resume/test_kills.py",
    "tests/test_notebooks.py",
    "tests/scanning/resume/test_interrupted.py",
    "tests/measure/test_memory_limit.py",
    "tests/scanning/resume/test_shards.py",
    "tests/checkpoint/test_quantize.py",
    "tests/calibration/test_gptq.py",
    "tests/training/test_memory.py",
    "tests/demo/test_outliers.py",
    "tests/scanning/test_memory.py",
    "tests/report/test_write.py",
    "tests/training/test_finetune.py",
    "tests/training/test_merge.py",
    "tests/training/test_trl.py",
    "tests/training/test_together.py",
    "tests/scanning/test_experts.py",
    "tests/test_wheel.py",
)
"""Files that take half a minute and more; they are begun first."""


EXPENSIVE = frozenset({"browser", "llama_11b", "published"})
"""Fixtures that take seconds, or start processes: what uses them is slow."""

ALIKE = frozenset(
    {
        *("qwen2_vl", "qwen2_5_vl", "llava_pixtral", "llama_tied"),  # tests.tiny
        *("qwen3_moe", "qwen3_vl_moe", "deepseek_v3", "gpt_oss", "llama4"),  # tests.mixtures
        *("qwen3_vl", "glm4v", "llava", "llava_next", "llava_onevision", "aya_vision"),  # tests.families
        *("idefics3", "smolvlm", "internvl", "gemma4"),
    }
)
"""Models on which any test is slow: mllama, llama, bert, mixtral and gemma3 stand for them in quick runs."""


def is_slow(item: pytest.Item) -> bool:
    """Whether a test is slow by what it uses, whatever it is marked with."""
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return not EXPENSIVE.isdisjoint(item.fixturenames) or any(
        isinstance(value, str) and value in ALIKE for value in given
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported while tests are collected stays: garbage collection passes over a million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)  # what is left is small, so that passes over all of it were frequent
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first and quick ones last, so that no process waits for another one's file at the end."""
    for item in items:
        if is_slow(item):
            item.add_marker("slow")
    files = [item.nodeid.partition("::")[0] for item in items]
    slow = {file for item, file in zip(items, files, strict=True) if item.get_closest_marker("slow")}

    def rank(file: str) -> int:
        if file in LONGEST:
            return LONGEST.index(file)
        return len(LONGEST) + (file not in slow)

    ranks = {id(item): rank(file) for item, file in zip(items, files, strict=True)}
    items.sort(key=lambda item: ranks[id(item)])


@pytest.fixture(autouse=True, scope="session")
def no_width() -> None:
    """pytest-xdist tells its workers a width, which would hold for all that qprobe prints."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    """No progress bar for each of the hundreds of tiny models; nothing where no test imports transformers."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def _no_wait_for_the_disk() -> Generator[None]:
    """Files are handed to the system and not to the disk: tests kill processes, but they cut no power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _bf16_by_float32() -> Generator[None]:
    """Tiny models compute in bf16 as users' do, which takes most of a scan's time where it is emulated."""
    if "torch" not in sys.modules:
        yield
        return
    from tests.emulation import compute_bf16_by_float32

    with pytest.MonkeyPatch.context() as patch:
        compute_bf16_by_float32(patch.setattr)
        yield


@pytest.fixture
def own_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's own bf16, for what counts tensors or compares with a process that has it."""
    from tests.emulation import compute_bf16_by_itself

    compute_bf16_by_itself(monkeypatch.setattr)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report is its page alone: pictures take longer than a tiny scan, and have tests of their own."""
    monkeypatch.setattr("qprobe.report.write._pictures", lambda *_: {})


@pytest.fixture
def quick_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration moves all rows of a weight at once, in a sixteenth of the steps."""
    monkeypatch.setattr("qprobe.calibration.two_sided.GROUPS", 1)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures without layout and pixels, which take most of a report, where nobody looks at them."""
    monkeypatch.setattr("qprobe.report.write._image", lambda figure, *_: str(figure).encode())
    monkeypatch.setattr("qprobe.report.figures.ConstrainedLayoutEngine.execute", lambda *_: None)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(name)`: that model's folder, written once per run of tests. Tests must not change it."""
    from tests import tiny  # which imports torch and transformers: six seconds that most rooms' tests save

    return cache(lambda name: once(tmp_path_factory, f"tiny/{name}", lambda folder: tiny.write(name, folder)))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`mixture(name)`: the folder of that tiny mixture of experts, as `tiny_folder`."""
    from tests import mixtures, tiny

    def write(name: str, folder: Path) -> None:
        tiny.write_recipe(mixtures.RECIPES[name], name, folder)

    return cache(lambda name: once(tmp_path_factory, f"mixtures/{name}", partial(write, name)))
