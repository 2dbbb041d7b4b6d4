"""What may import what at run time, and that the public names are there.

`lint-imports` (part of `make lint`) checks the same from the source; here the interpreter is asked, which
also sees what third-party packages draw in.
"""

import pkgutil
import subprocess
import sys

import pytest

import qprobe

HEAVY = ("torch", "transformers", "bitsandbytes", "accelerate")
TORCH_FREE = (
    "qprobe",
    "qprobe.cli",
    "qprobe.exports",
    "qprobe.registry.sizes",
    "qprobe.manifest.manifest",
    "qprobe.scanning.findings",
    "qprobe.runs.store",
    "qprobe.models.catalogue",
    "qprobe.models.geometry",
    "qprobe.checkpoint.layouts",
    "qprobe.models.headers",
    "qprobe.options",
    "qprobe.report.write",
    "qprobe.selection",
)


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after running `code`."""
    program = f"{code}\nimport sys; print('\\n'.join({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_no_torch(module: str):
    assert loaded_by(f"import {module}").isdisjoint(HEAVY)


def test_help_imports_nothing_heavy():
    code = "from qprobe.cli import main; [main(a, standalone_mode=False) for a in (['-h'], ['scan', '-h'])]"
    assert loaded_by(code).isdisjoint({*HEAVY, "pandas", "matplotlib", "numpy", "scipy"})


@pytest.mark.parametrize("name", qprobe.__all__)
def test_public_names_exist(name: str):
    assert getattr(qprobe, name) is not None and name in dir(qprobe)


def test_no_module_takes_the_place_of_a_public_function():
    modules = {module.name for module in pkgutil.iter_modules(qprobe.__path__)}
    assert modules.isdisjoint(qprobe.__all__)


def test_functions_stay_functions_once_every_module_is_imported():
    code = (
        "import qprobe.cli, qprobe.scanning.scan, qprobe.scanning.join, qprobe.report.write\n"
        "from qprobe import join, scan, select\n"
        "assert all(map(callable, (join, scan, select)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qprobe.no_such_name


def test_listing_the_known_models_imports_no_torch():
    code = "from qprobe.cli import main; main(['models'], standalone_mode=False)"
    program = f"import io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()): exec({code!r})"
    assert loaded_by(program).isdisjoint(HEAVY)
