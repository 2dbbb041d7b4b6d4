"""Do the tests notice when a line of the package is wrong?

    python -m tests.benchmarks.mutations [--seed 19] [--mutants 60] [--out FILE] [--log FILE] [--only N ...]
        [--covered FILE] [--minutes M]

Cosmic Ray says which changes there are (an operator, a comparison, a number, a keyword, a decorator, ...) in
the rooms `ROOMS`. The seed draws places of the source, each as likely as any other, and one change at each.
Every change is made in a copy of the files that git knows, one at a time, and the tests that run the changed
line run there until one fails, in the order of `STAGES`: the quick tests of its room, its slow ones, and the
same of other rooms; in each stage files named after the module first, then the quicker ones. Which tests
run which lines coverage says (`tests.benchmarks.covering`), of a run without any change, kept in `--covered`;
tests that fail then are left out and named. A change is caught when a test fails, or when the run takes three
times the CPU time that it takes without it. `--only` tries some of the drawn ones, by their number; after
`--minutes` no further one is begun, and the table says which are not tried to the end.

Left out before drawing: annotations, which are never evaluated here (`from __future__ import annotations`),
blocks for type checkers alone, and kernels that only a GPU runs.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import bitsandbytes  # noqa: F401  (with those below: imported once, for every run)
import pandas  # noqa: F401
import pytest
import scipy.special  # noqa: F401
import torch
import transformers  # noqa: F401
from cosmic_ray import mutating, plugins
from cosmic_ray.ast import ast_nodes, get_ast

from tests.benchmarks.covering import Chosen, Covered, gather, reached_by, tests_for

ROOMS = ("measure", "calibration", "selection", "runs", "checkpoint", "data")
ROOT = Path(__file__).parents[2]
GPU_ONLY = ("cuda.py",)
STAGES = ("quick", "slow", "quick elsewhere", "slow elsewhere")  # in this order; elsewhere: of other rooms
PATIENCE = 3.0  # times the CPU time of the same tests without a change, and a minute
LOG = ".mutations.log"  # in the copy: what the last run said
LONGEST = 1800.0  # seconds by the clock, for what waits without end
ALONE = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")

Place = tuple[int, int]  # line from 1, column from 0


@dataclass(frozen=True)
class Change:
    """One change: the `occurrence`-th that the operator can make in the file."""

    file: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str


@dataclass(frozen=True)
class Outcome:
    """What one of `STAGES` made of a change. test: the first that failed, "" if none did."""

    number: int
    change: Change
    stage: str
    test: str
    seconds: float


def inert(source: str) -> list[tuple[Place, Place]]:
    """From where to where `source` holds what never runs: annotations, and blocks for type checkers."""
    spans: list[ast.AST | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign):
            spans.append(node.annotation)
        elif isinstance(node, ast.arg):
            spans.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            spans.append(node.returns)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            spans.append(node)
    return [
        ((x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset))  # type: ignore[attr-defined]
        for x in spans
        if x is not None
    ]


def places(source: str) -> dict[Place, list[tuple[str, int]]]:
    """(operator, occurrence) of every change that can be made in `source`, by where it begins."""
    nodes, left_out = list(ast_nodes(get_ast(source))), inert(source)
    found: dict[Place, list[tuple[str, int]]] = {}
    for name in sorted(plugins.operator_names()):
        operator = plugins.get_operator(name)
        if operator.arguments():  # takes names of variables that a user wants changed
            continue
        starts = (start for node in nodes for start, _ in operator().mutation_positions(node))
        for occurrence, start in enumerate(starts):
            if not any(begin <= start < end for begin, end in left_out):
                found.setdefault(start, []).append((name, occurrence))
    return found


def drawn(seed: int, count: int) -> list[Change]:
    """`count` changes, of places that are all as likely."""
    found_in = (path for room in ROOMS for path in (ROOT / "qprobe" / room).rglob("*.py"))
    files = sorted(path for path in found_in if path.name not in GPU_ONLY)
    sources = {path: path.read_text() for path in files}
    there = [(path, place, some) for path in files for place, some in sorted(places(sources[path]).items())]
    print(f"{len(there):,} places in {len(files)} files", flush=True)
    draw = random.Random(seed)
    draw.shuffle(there)
    found: list[Change] = []
    for path, (line, _), some in there:
        name, occurrence = draw.choice(some)
        try:
            changed = mutating.mutate_code(sources[path], plugins.get_operator(name)(), occurrence)
        except AttributeError:  # Cosmic Ray 8.7 cannot replace an exception that is named with a dot
            continue
        before, after = difference(sources[path], changed or sources[path], line)
        if before != after:
            found.append(Change(str(path.relative_to(ROOT)), line, name, occurrence, before, after))
        if len(found) == count:
            break
    return found


def difference(source: str, changed: str, line: int) -> tuple[str, str]:
    """The line as it was and as it is, without indentation."""
    return tuple(text.splitlines()[line - 1].strip() for text in (source, changed))  # type: ignore[return-value]


def copied(to: Path) -> Path:
    """The files that git knows, in `to`."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, names):
        if name.startswith(("qprobe/", "tests/")) or "/" not in name:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


class Tests:
    """The tests of a copy, and what they cover, gathered when it is first asked for and kept in `kept`."""

    def __init__(self, copy: Path, kept: Path) -> None:
        self.copy, self.kept = copy, kept
        self.folders = sorted({x.relative_to(copy).parts[1] for x in (copy / "tests").rglob("test_*.py")})

    def of(self, change: Change, stage: str) -> list[Covered]:
        """The tests that run the change, in order."""
        room, marked = Path(change.file).parts[1], "slow" if stage.startswith("slow") else "not slow"
        own = [x for x in self.folders if (x == room) != stage.endswith("elsewhere")]
        covered = [one for folder in own for one in self._covered(folder, marked)]
        lines = reached_by((self.copy / change.file).read_text(), change.line)
        return tests_for(covered, change.file, lines)

    def _covered(self, folder: str, marked: str) -> list[Covered]:
        path = self.kept / f"{folder} {marked}.jsonl"
        if not path.is_file():
            start = time.perf_counter()
            arguments = [*ALONE, f"tests/{folder}"]
            child = forked(self.copy, partial(gather, arguments, marked, self.copy, ROOMS, path), keeps=True)
            os.waitpid(child, 0)
            if not path.is_file():
                raise SystemExit(f"The {marked} tests of {folder} do not run: {logged(self.copy)[-2000:]}")
            print(f"{marked} tests of {folder} gathered in {time.perf_counter() - start:.0f} s", flush=True)
        found = [Covered(**json.loads(x)) for x in path.read_text().splitlines()]
        for one in found:
            if one.fails:
                print(f"{one.test} fails without any change, so it is left out", flush=True)
        return found


def tried(number: int, change: Change, stage: str, tests: Tests) -> Outcome:
    """What the tests of a stage make of `change`."""
    chosen = tests.of(change, stage)
    start = time.perf_counter()
    if not chosen:
        return Outcome(number, change, stage, "", 0.0)
    with mutating.use_mutation(
        tests.copy / change.file, plugins.get_operator(change.operator)(), change.occurrence
    ):
        test = first_failure(chosen, tests.copy)
    return Outcome(number, change, stage, test or "", time.perf_counter() - start)


def first_failure(chosen: Sequence[Covered], copy: Path) -> str | None:
    """The first of `chosen` that fails, or why the run ended otherwise; None if all pass or none is there."""
    limit_s = 60 + PATIENCE * sum(x.seconds for x in chosen)  # of CPU, which other processes do not change
    files = list(dict.fromkeys(x.file for x in chosen))

    def run() -> int:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s) + 1, int(limit_s) + 10))
        return int(pytest.main([*ALONE, "-x", *files], plugins=[Chosen(chosen)]))

    child, start = forked(copy, run), time.monotonic()
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - start > LONGEST:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "time is up"
        time.sleep(0.1)
    status = os.waitstatus_to_exitcode(ended[1])
    if status in (0, 5):
        return None
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return "time is up"
    lines = [x for x in logged(copy).splitlines() if x.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else f"pytest ended with {status}"


def logged(copy: Path) -> str:
    """What the last run said."""
    return (copy / LOG).read_text(errors="replace")


def forked(copy: Path, work: Callable[[], int | None], keeps: bool = False) -> int:
    """A process that does `work` in `copy`, of which nothing is imported yet, and exits with what that gives.

    It is a fork of this one, which has imported the large libraries once. keeps: whether it leaves bytecode,
    as only runs may in which nothing is changed.
    """
    child = os.fork()
    if child == 0:
        in_copy(copy, work, keeps)
    return child


def in_copy(copy: Path, work: Callable[[], int | None], keeps_bytecode: bool) -> NoReturn:
    """Do `work` in `copy`, and end this process with what it gives."""
    code = 1
    try:
        os.setsid()
        said = os.open(copy / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy)}
        sys.dont_write_bytecode = not keeps_bytecode
        sys.path[:] = [str(copy), *(x for x in sys.path if x and Path(x).resolve() != ROOT)]
        for name in [x for x in sys.modules if x.partition(".")[0] in ("qprobe", "tests")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def table(outcomes: Sequence[Outcome], seed: int) -> str:
    """The Markdown of all `outcomes`."""
    caught = sum(bool(x.test) for x in outcomes)
    open_yet = sum(not x.test and x.stage != STAGES[-1] for x in outcomes)
    head = f"Seed {seed}: {caught} of {len(outcomes)} changes are caught"
    head += f"; {open_yet} were not tried to the end.\n" if open_yet else ".\n"
    rows = ["| | where | was | is | caught by |", "|---|---|---|---|---|"]
    for x in outcomes:
        before, after = (
            f"`` {text.replace('|', chr(92) + '|')} ``" for text in (x.change.before, x.change.after)
        )
        by = x.test.removeprefix("FAILED ").removeprefix("ERROR ").removeprefix("tests/") or (
            "**nothing**" if x.stage == STAGES[-1] else f"nothing up to {x.stage or 'now'}"
        )
        where = f"{x.change.file.removeprefix('qprobe/')}:{x.change.line}"
        rows.append(f"| {x.number} | {where} | {before} | {after} | {by} |")
    return "\n".join([head, *rows, ""])


def known_outcomes(log: Path | None, changes: Mapping[int, Change]) -> dict[int, Outcome]:
    """The last outcome of each change that `log` holds. Raises SystemExit if they are of other changes."""
    found: dict[int, Outcome] = {}
    for line in log.read_text().splitlines() if log and log.is_file() else ():
        one = json.loads(line)
        outcome = Outcome(**{**one, "change": Change(**one["change"])})
        if changes.get(outcome.number) != outcome.change:
            raise SystemExit(f"{log} is of another seed or of other sources. Name a new one.")
        found[outcome.number] = outcome
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--mutants", type=int, default=60)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    parser.add_argument("--log", type=Path, help="a JSON line for each run, which is not done again")
    parser.add_argument(
        "--covered", type=Path, help="a folder for what tests cover, which is not gathered again"
    )
    parser.add_argument("--minutes", type=float, default=inf, help="no change is begun after so many")
    parser.add_argument("--list", action="store_true", help="show what is drawn, and try nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # threads would not outlive a fork
    changes = list(enumerate(drawn(asked.seed, asked.mutants), start=1))
    wanted = [(n, x) for n, x in changes if not asked.only or n in asked.only]
    if asked.list:
        for number, x in wanted:
            print(f"{number} {x.file}:{x.line} {x.operator}\n  - {x.before}\n  + {x.after}")
        return
    found = known_outcomes(asked.log, dict(changes))
    end = time.monotonic() + asked.minutes * 60
    with TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        compileall.compile_dir(copy / "qprobe", quiet=1)
        kept = asked.covered or Path(folder) / "covered"
        kept.mkdir(parents=True, exist_ok=True)
        tests = Tests(copy, kept)
        for stage in STAGES:
            for number, change in wanted:
                last = found.setdefault(number, Outcome(number, change, "", "", 0.0))
                is_done = last.stage and STAGES.index(last.stage) >= STAGES.index(stage)
                if last.test or is_done or time.monotonic() > end:
                    continue
                found[number] = last = tried(number, change, stage, tests)
                said = f"caught by {last.test}" if last.test else "not caught"
                print(
                    f"{number} {stage} {change.file}:{change.line} {last.seconds:.0f} s: {said}", flush=True
                )
                if asked.log:
                    with asked.log.open("a") as log:
                        log.write(json.dumps(asdict(last)) + "\n")
    outcomes = [found[number] for number, _ in wanted]
    text = table(outcomes, asked.seed)
    print(text)
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
