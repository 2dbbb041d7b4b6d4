"""Scans of tiny models, made once."""

from __future__ import annotations

import pytest

from qprobe.scanning.run import ScanResult
from tests.scanning.asked import Scanned, TinyFolder, options, scan


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all else here, and have tests of their own."""
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])


@pytest.fixture(scope="session")
def scanned(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Scanned:
    """`scanned(name)`: a scan of that tiny model, made once. Tests must not change its folder."""
    done: dict[str, ScanResult] = {}

    def make(name: str) -> ScanResult:
        if name not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
                done[name] = scan(**options(tiny_folder(name), tmp_path_factory.mktemp(name) / "run"))
        return done[name]

    return make
