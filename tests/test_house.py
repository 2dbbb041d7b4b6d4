"""The tests themselves: each file of tests is run, and stands where the package's folders say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
