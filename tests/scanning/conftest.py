"""Scans of tiny models, made once."""

from __future__ import annotations

import pickle
from functools import cache, partial
from pathlib import Path

import pytest

from qprobe.scanning.run import ScanResult
from tests.once import once
from tests.scanning.asked import Scanned, TinyFolder, options, scan


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all else here, and have tests of their own."""
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])


@pytest.fixture(scope="session")
def scanned(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Scanned:
    """`scanned(name)`: a scan of that tiny model, made once per run of tests. None may change its folder."""

    def make(name: str, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
            found = scan(**options(tiny_folder(name), folder / "run"))
        (folder / "found.pickle").write_bytes(pickle.dumps(found))

    @cache
    def found(name: str) -> ScanResult:
        folder = once(tmp_path_factory, f"scanned/{name}", partial(make, name))
        return pickle.loads((folder / "found.pickle").read_bytes())

    return found
