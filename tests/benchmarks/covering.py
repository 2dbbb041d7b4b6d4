"""Which tests run which lines of the package: gathered once, by running the tests under coverage."""

from __future__ import annotations

import ast
import json
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from coverage import Coverage

Lines = dict[str, set[int]]  # of each file of the package


@dataclass(frozen=True)
class Covered:
    """What one test runs, together with the fixtures that it uses and shares.

    test: its node id. seconds: of CPU. lines: that it runs, by file of the package. fails: whether it failed
    though nothing was changed; then it tells nothing.
    """

    test: str
    marked: str
    seconds: float
    lines: dict[str, list[int]]
    fails: bool

    @property
    def file(self) -> str:
        """The file that holds the test."""
        return self.test.partition("::")[0]


class PerTest:
    """A plugin of pytest that tells tests, and the fixtures they share, apart in what `measured` sees."""

    def __init__(self, measured: Coverage) -> None:
        self.measured = measured
        self.context = ""
        self.seconds: dict[str, float] = defaultdict(float)
        self.fixtures: dict[str, set[str]] = {}
        self.failed: set[str] = set()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        start = time.process_time()
        used = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
        self.fixtures[item.nodeid] = {_named(one) for several in used for one in several}
        self._switch(item.nodeid)
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] += time.process_time() - start

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
        before = self.context
        self._switch(_named(fixturedef))
        try:
            return (yield)
        finally:
            self._switch(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def _switch(self, context: str) -> None:
        self.context = context
        self.measured.switch_context(context)


class Chosen:
    """A plugin of pytest that leaves `tests` alone, in the order of their files."""

    def __init__(self, tests: Sequence[Covered]) -> None:
        self.tests = {x.test for x in tests}
        self.ranks = {file: rank for rank, file in enumerate(dict.fromkeys(x.file for x in tests))}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [x for x in items if x.nodeid in self.tests]
        items[:] = sorted(kept, key=lambda x: self.ranks[x.nodeid.partition("::")[0]])


def gather(arguments: Sequence[str], marked: str, root: Path, rooms: Iterable[str], to: Path) -> None:
    """Run pytest in `root` and write what each test covers of `rooms` to `to`, as JSON lines.

    To be called before the package is imported.
    """
    measured = Coverage(data_file=None, include=[f"{root}/qprobe/{room}/*" for room in rooms])
    plugin = PerTest(measured)
    measured.start()
    pytest.main([*arguments, "-m", marked], plugins=[plugin])
    measured.stop()
    ran: dict[str, Lines] = defaultdict(lambda: defaultdict(set))
    data = measured.get_data()
    for path in data.measured_files():
        name = str(Path(path).relative_to(root))
        for line, contexts in data.contexts_by_lineno(path).items():
            for context in contexts:
                ran[context][name].add(line)
    found = [
        Covered(test, marked, seconds, _together(ran, test, plugin.fixtures[test]), test in plugin.failed)
        for test, seconds in sorted(plugin.seconds.items())
    ]
    to.write_text("".join(json.dumps(asdict(x)) + "\n" for x in found))


def tests_for(covered: Iterable[Covered], file: str, lines: range) -> list[Covered]:
    """Those that run one of the lines; of no line at all, those that run anything of the file.

    Files that are named after the module come first, then those whose tests are quicker.
    """
    there = [x for x in covered if not x.fails and file in x.lines]
    on_line = [x for x in there if not lines or not set(lines).isdisjoint(x.lines[file])]
    named = f"test_{Path(file).stem}"
    seconds: dict[str, float] = defaultdict(float)
    for x in on_line:
        seconds[x.file] += x.seconds
    return sorted(on_line, key=lambda x: (Path(x.file).stem != named, seconds[x.file], x.file))


def reached_by(source: str, line: int) -> range:
    """The lines whose running shows what a change of `line` does; none where any use of the module may.

    In a function's body they are those of the statement, without the blocks in it; of its decorators and its
    signature those of the body. Other lines run on import, when no test is running yet; those of a function
    whose results are cached run once, in whichever test asks first.
    """
    found = range(0)
    for node in ast.walk(ast.parse(source)):  # outer ones before those in them
        if not isinstance(node, ast.stmt) or not _first(node) <= line <= (node.end_lineno or 0):
            continue
        block = getattr(node, "body", None)
        if not isinstance(node, ast.FunctionDef):
            last = block[0].lineno - 1 if block else node.end_lineno
            found = range(node.lineno, max(node.lineno, last or 0) + 1) if found else found
        elif any("cache" in ast.unparse(x) for x in node.decorator_list):
            return range(0)
        elif line < node.body[0].lineno:
            return range(node.body[0].lineno, (node.end_lineno or 0) + 1)
        else:
            found = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
    return found


def _first(node: ast.stmt) -> int:
    """The first line of a statement, with its decorators."""
    return min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])


def _together(ran: dict[str, Lines], test: str, fixtures: Iterable[str]) -> dict[str, list[int]]:
    """What `test` runs by itself, and what its fixtures do, whichever test they were first set up for."""
    found: Lines = defaultdict(set)
    for context in (test, *fixtures):
        for file, lines in ran.get(context, {}).items():
            found[file] |= lines
    return {file: sorted(lines) for file, lines in sorted(found.items())}


def _named(fixture: pytest.FixtureDef[object]) -> str:
    """What tells a fixture apart from others of its name."""
    return f"{fixture.baseid}::{fixture.argname} (fixture)"
