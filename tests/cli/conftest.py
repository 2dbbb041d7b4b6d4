"""Running commands in this process, with library functions replaced where they would need a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qprobe.cli import main
from tests.report.runs import write_run

SPIKES = {3: 50.0, 17: 80.0}


@pytest.fixture
def qprobe() -> Callable[..., Result]:
    """`qprobe("rank", run)`: the result of the command, with stdout and stderr apart."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="qprobe")

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`fake("qprobe.scanning.scan", scan=f)`: that module is replaced by one with these functions."""

    def replace(module: str, **functions: Any) -> None:
        stand_in = ModuleType(module)
        vars(stand_in).update(functions)
        monkeypatch.setitem(sys.modules, module, stand_in)

    return replace


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 30 layers with spikes at 3 and 17. Tests must not change it."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, 30, SPIKES)
    return folder
