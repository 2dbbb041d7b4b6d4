"""The tests themselves: each file of tests is run, and stands where the package's folders say."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from dataclasses import is_dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import qprobe
from tests import versions
from tests.conftest import LONGEST

ROOT = Path(__file__).parents[1]
# The files that pytest turns into test modules, found without importing one of them.
LISTER = """
import sys, pytest

class File(pytest.File):
    def collect(self):
        return []

class Lister:
    def __init__(self):
        self.paths = []
    def pytest_pycollect_makemodule(self, module_path, parent):
        self.paths.append(module_path)
        return File.from_parent(parent, path=module_path)

lister = Lister()
pytest.main(["--collect-only", "-qq", "--noconftest", "-p", "no:cacheprovider"], plugins=[lister])
print("\\n".join(str(path) for path in lister.paths), file=sys.stderr)
"""


def collected() -> set[Path]:
    """The files of tests that pytest finds if nobody names a path."""
    done = subprocess.run(
        [sys.executable, "-c", LISTER], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {Path(line) for line in done.stderr.splitlines()}


def written() -> set[Path]:
    """The files of tests in git, new ones too; outside a checkout, those on the disk."""
    if not (ROOT / ".git").exists():
        return set((ROOT / "tests").rglob("test_*.py"))
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", ":(glob)tests/**/test_*.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {path for line in done.stdout.splitlines() if (path := ROOT / line).exists()}


def test_pytest_collects_every_file_of_tests_in_git_and_no_other():
    found = collected()
    assert len(found) > 90 and found == written()


def test_files_that_are_begun_first_are_there():
    assert {ROOT / file for file in LONGEST} <= written()


def test_pre_commit_runs_what_make_lint_runs():
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0].splitlines()[1:]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [x.strip().replace("$(BIN)", ".venv/bin") for x in recipe]


def test_ci_runs_make_test_and_nothing_else():
    *setup, command = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command == "make test" and not any("make" in line for line in setup)


def test_every_room_has_tests_and_every_folder_of_tests_has_a_room():
    rooms = {path.parent.name for path in (ROOT / "qprobe").glob("*/__init__.py")}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")} - {
        "benchmarks",
        "fuzz",
    }  # programs
    assert folders == rooms
    assert {name for name in folders if not any((ROOT / "tests" / name).rglob("test_*.py"))} == set()


def test_both_ends_of_the_versions_are_read_from_the_project():
    stated = {requirement.name: requirement for requirement in versions.requirements()}
    assert stated.keys() == set(versions.VARIED)
    assert versions.lowest(Requirement("x>=1.5,<2")) == "x==1.5"
    for name, requirement in stated.items():
        assert requirement.specifier.contains(versions.lowest(requirement).removeprefix(f"{name}=="))
        assert requirement.specifier.contains(version(name))


STATE = {  # what changes while a command runs; all other records are values
    *(
        "Clock",
        "Noted",
        "Pictures",
        "Gram",
        "_Survey",
        "Gathering",
        "_Recorded",
        "_Tuning",
        "References",
        "Reads",
    ),
    *("SharedRows", "Norms", "OutputErrors", "WeightStore", "MemoryLimit", "_Room"),
    "ExpertsConfig",  # as transformers makes its configs
}


@pytest.mark.slow
def test_records_are_frozen_unless_they_are_state():
    modules = pkgutil.walk_packages(qprobe.__path__, "qprobe.")
    # Of these one would run the command line, and one needs what comes with PyTorch for CUDA alone.
    names = (x.name for x in modules if x.name.rpartition(".")[2] not in ("__main__", "cuda"))
    found = {}
    for module in map(importlib.import_module, names):
        own = (x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__)
        found |= {x: x.__dataclass_params__.frozen for x in own if is_dataclass(x) and isinstance(x, type)}
    assert len(found) > 200
    assert {x.__name__ for x, is_frozen in found.items() if not is_frozen} == STATE
