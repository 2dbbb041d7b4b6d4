"""The package as a wheel: whole, and at work outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run_python(folder: Path, *arguments: str | Path, path: Path = ROOT) -> str:
    """What the interpreter prints with `arguments` in `folder`, where it finds qprobe in `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder, env=environment)
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_python(ROOT, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (path,) = folder.iterdir()
    return path


def test_it_holds_every_file_of_the_package_and_nothing_else(wheel: Path):
    files = {x.relative_to(ROOT) for x in (ROOT / "qprobe").rglob("*") if x.is_file()}
    wanted = {x.as_posix() for x in files if "__pycache__" not in x.parts}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted
    kinds = {".py", ".typed", ".json", ".safetensors", ".html", ".js", ".css"}
    assert {Path(name).suffix for name in held} >= kinds


def test_it_scans_where_there_is_no_checkout(wheel: Path, tmp_path: Path):
    clean = tmp_path / "clean"
    options = ("--quiet", "--no-index", "--no-deps", "--target", clean)
    run_python(tmp_path, "-m", "pip", "--disable-pip-version-check", "install", *options, wheel)
    where = run_python(tmp_path, "-c", "import qprobe; print(qprobe.__file__)", path=clean)
    assert Path(where).is_relative_to(clean)
    scan = ("-m", "qprobe", "scan", "--json", "--model", "demo", "--measures", "weight", "--device", "cpu")
    found = json.loads(run_python(tmp_path, *scan, "--out", tmp_path / "run", path=clean))
    assert Path(found["skiplist"]).is_file() and (tmp_path / "run" / "report" / "index.html").is_file()
