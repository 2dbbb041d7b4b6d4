"""One undisturbed scan, and its shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from qprobe.scanning.run import ScanResult
from tests.once import once
from tests.scanning.asked import scan
from tests.scanning.resume.runs import Share, TinyFolder, options


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])


@pytest.fixture(scope="session")
def llama(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("llama")


@pytest.fixture(scope="session")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one undisturbed process: three units of two samples. Nobody may change it."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
            scan(**options(llama, folder / "run"))

    return once(tmp_path_factory, "whole", make) / "run"


@pytest.fixture
def share(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Share:
    """`share(rank, world, out)`: the scan as that process of that many."""

    def run(rank: int, world: int, out: Path) -> ScanResult:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        try:
            return scan(**options(llama, out))
        finally:
            monkeypatch.delenv("RANK")
            monkeypatch.delenv("WORLD_SIZE")

    return run
