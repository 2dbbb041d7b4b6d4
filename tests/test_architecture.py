"""What may import what at run time, how the package is cut, and that the public names are there.

`lint-imports` (part of `make lint`) checks the same from the source; here the interpreter is asked, which
also sees what third-party packages draw in.
"""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qprobe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qprobe"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
(WITHOUT_TORCH,) = (contract for contract in CONTRACTS if contract["name"] == "Rooms without torch")
HEAVY = set(WITHOUT_TORCH["forbidden_modules"])
# Imports every module of the rooms named, and prints what each was the first to draw in.
IMPORT_ALL = """
import importlib, json, pkgutil, sys

def modules(room):
    yield room
    for part in pkgutil.walk_packages(getattr(sys.modules[room], "__path__", ()), room + "."):
        yield part.name

seen, drawn = set(), {}
for room in sys.argv[1:]:
    importlib.import_module(room)
    for name in modules(room):
        importlib.import_module(name)
        now = {loaded.partition(".")[0] for loaded in sys.modules}
        drawn[name], seen = sorted(now - seen), now
import qprobe
taken = [name for name in qprobe.__all__ if isinstance(qprobe.__dict__.get(name), type(sys))]
print(json.dumps({"drawn": drawn, "taken": taken}))
"""


def run_python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints that runs `code`."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after running `code`."""
    said = run_python(f"{code}\nimport sys; print('\\n'.join({{m.partition('.')[0] for m in sys.modules}}))")
    return set(said.splitlines())


@pytest.mark.slow
def test_the_rooms_without_torch_import_no_torch():
    # One interpreter for all: if none of them draws torch in, none does so alone.
    rooms = WITHOUT_TORCH["source_modules"]
    told = json.loads(run_python(IMPORT_ALL, "qprobe.cli", *rooms))
    assert {room for room in rooms if room not in told["drawn"]} == set()
    assert {name: heavy for name, new in told["drawn"].items() if (heavy := HEAVY & set(new))} == {}
    assert told["taken"] == []  # a module in the place of a public function


def test_help_imports_nothing_heavy():
    code = "from qprobe.cli import main; [main(a, standalone_mode=False) for a in (['-h'], ['scan', '-h'])]"
    assert loaded_by(code).isdisjoint({*HEAVY, "pandas", "matplotlib", "numpy", "scipy"})


@pytest.mark.parametrize("name", qprobe.__all__)
def test_public_names_exist(name: str):
    assert getattr(qprobe, name) is not None and name in dir(qprobe)


def test_no_room_has_the_name_of_a_public_function():
    modules = {module.name for module in pkgutil.iter_modules(qprobe.__path__)}
    assert modules.isdisjoint(qprobe.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qprobe.no_such_name


@pytest.mark.slow
def test_listing_the_known_models_imports_no_torch():
    code = "from qprobe.cli import main; main(['models'], standalone_mode=False)"
    program = f"import io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()): exec({code!r})"
    assert loaded_by(program).isdisjoint(HEAVY)


def test_every_room_stands_in_the_layers():
    (layers,) = (contract["layers"] for contract in CONTRACTS if contract["type"] == "layers")
    modules = {f"qprobe.{module.name}" for module in pkgutil.iter_modules(qprobe.__path__)}
    assert modules - {"qprobe.__main__"} == set(layers)
    assert not any("ignore_imports" in contract for contract in CONTRACTS)


def test_the_top_of_the_package_holds_five_files():
    names = {path.name for path in PACKAGE.glob("*.py")}
    assert names == {"__init__.py", "__main__.py", "errors.py", "options.py", "records.py"}


def test_no_folder_has_more_than_16_modules():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    counts = {str(x.relative_to(ROOT)): len(list(x.glob("*.py"))) - 1 for x in folders}  # besides __init__
    del counts["qprobe/models/families"]
    assert {name: count for name, count in counts.items() if count > 16} == {}


def test_no_python_file_has_more_than_400_lines():
    files = [path for top in ("qprobe", "tests") for path in (ROOT / top).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 400} == {}
