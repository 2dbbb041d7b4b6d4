"""One undisturbed scan, and its shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qprobe.scanning.run import ScanResult
from tests.once import once
from tests.scanning.asked import scan, write_lines
from tests.scanning.resume.runs import Calibrated, Share, TinyFolder, options


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


@pytest.fixture(scope="session")
def calibrated(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """The run of one process that weighs tokens, calibrates and tunes. Nobody may change it."""

    def asked(folder: Path) -> dict[str, Any]:
        return {"data": folder / "rows.jsonl", "samples": 30, "format": "nf4-calibrated", "tune": 4}

    def make(folder: Path) -> None:
        rows = [{"prompt": f"What comes after {i}?", "answer": f"the number {i + 1}"} for i in range(30)]
        folder.mkdir()
        write_lines(folder / "rows.jsonl", *rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
            patch.setattr("qprobe.calibration.two_sided.GROUPS", 1)  # as the fixture `quick_rounding`
            scan(**options(llama, folder / "run", **asked(folder)))

    folder = once(tmp_path_factory, "calibrated", make)
    return Calibrated(folder / "run", asked(folder))


@pytest.fixture
def share(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Share:
    """`share(rank, world, out)`: the scan as that process of that many."""

    def run(rank: int, world: int, out: Path, **changes: Any) -> ScanResult:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        try:
            return scan(**options(llama, out, **changes))
        finally:
            monkeypatch.delenv("RANK")
            monkeypatch.delenv("WORLD_SIZE")

    return run
