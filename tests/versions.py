"""The tests on the lowest and the newest transformers, peft and bitsandbytes that pyproject.toml allows.

    python -m tests.versions [ARGUMENTS OF PYTEST]

Each end gets an environment of its own under .versions/, which sees everything else, torch above all, in the
environment that runs this. The variable PIP_FLAGS is handed to pip.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".versions"
VARIED = ("transformers", "peft", "bitsandbytes")


def requirements() -> list[Requirement]:
    """What pyproject.toml says of the packages whose versions are varied."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["train"]])
    return [requirement for requirement in stated if requirement.name in VARIED]


def lowest(requirement: Requirement) -> str:
    """The requirement as its lower bound alone."""
    (bound,) = (x.version for x in requirement.specifier if x.operator == ">=")
    return f"{requirement.name}=={bound}"


def environment(name: str) -> Path:
    """The interpreter of a fresh environment whose packages come before those of this one."""
    folder = FOLDER / name
    venv.create(folder, clear=True, with_pip=True)
    own = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    (Path(own) / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def install(python: Path, *asked: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*command, *shlex.split(os.environ.get("PIP_FLAGS", "")), *asked], check=True)


def run(name: str, asked: list[str], arguments: list[str]) -> int:
    """The exit status of pytest with the packages `asked`."""
    python = environment(name)
    install(python, *asked)
    shown = "import importlib.metadata as m, sys; print({name: m.version(name) for name in sys.argv[1:]})"
    subprocess.run([python, "-c", shown, *VARIED], check=True)
    # Editable installs of the base are not seen; processes that the tests start need the package as well.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, env=variables).returncode


def main(arguments: list[str]) -> int:
    """0 if the tests pass on both ends of the range."""
    stated = requirements()
    ends = {"lowest": [lowest(x) for x in stated], "newest": [str(x) for x in stated]}
    return max([run(name, asked, arguments) for name, asked in ends.items()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
