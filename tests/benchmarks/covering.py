"""Which test files run which lines of the package: gathered once, by running the tests under coverage."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from coverage import Coverage


@dataclass(frozen=True)
class Covered:
    """What the tests of one file run that `marked` selects.

    file: of tests. seconds: of CPU. lines: that they run, by file of the package. fails: whether one of them
    failed though nothing was changed; then they tell nothing.
    """

    file: str
    marked: str
    seconds: float
    lines: dict[str, list[int]]
    fails: bool


class PerFile:
    """A plugin of pytest that tells the files of tests apart in what `measured` sees."""

    def __init__(self, measured: Coverage) -> None:
        self.measured = measured
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        file, start = _file(item.nodeid), time.process_time()
        self.measured.switch_context(file)
        try:
            return (yield)
        finally:
            self.seconds[file] += time.process_time() - start

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(_file(report.nodeid))


def gather(arguments: Sequence[str], marked: str, root: Path, rooms: Iterable[str], to: Path) -> None:
    """Run pytest in `root` and write what each file of tests covers of `rooms` to `to`, as JSON lines.

    To be called before the package is imported.
    """
    measured = Coverage(data_file=None, include=[f"{root}/qprobe/{room}/*" for room in rooms])
    plugin = PerFile(measured)
    measured.start()
    pytest.main([*arguments, "-m", marked], plugins=[plugin])
    measured.stop()
    lines: dict[str, dict[str, list[int]]] = defaultdict(dict)
    data = measured.get_data()
    for path in data.measured_files():
        name = str(Path(path).relative_to(root))
        for line, contexts in sorted(data.contexts_by_lineno(path).items()):
            for file in contexts:
                lines[file].setdefault(name, []).append(line)
    found = [
        Covered(file, marked, seconds, lines[file], file in plugin.failed)
        for file, seconds in sorted(plugin.seconds.items())
    ]
    to.write_text("".join(json.dumps(asdict(x)) + "\n" for x in found))


def files_for(covered: Iterable[Covered], file: str, line: int) -> list[Covered]:
    """Those that run the line, quick ones first; where none does, as of lines that run on import, its file.

    Files named after the module come first.
    """
    there = [x for x in covered if not x.fails and file in x.lines]
    on_line = [x for x in there if line in x.lines[file]]
    named = f"test_{Path(file).stem}"
    return sorted(on_line or there, key=lambda x: (Path(x.file).stem != named, x.seconds))


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
