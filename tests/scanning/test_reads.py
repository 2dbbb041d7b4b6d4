"""How often one command reads the files of a run folder: scan.json at most twice, each unit at most once."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from click.testing import CliRunner

from qprobe.cli import main
from qprobe.report.write import write_report
from tests.scanning.asked import Scanned, TinyFolder

READ: list[str] = []
"""Paths of the files that were opened for reading, in order; cleared by `reads_of`."""


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        if arguments[2] & os.O_ACCMODE == os.O_RDONLY:
            READ.append(os.fspath(arguments[0]))


sys.addaudithook(_note)  # for good: an audit hook cannot be removed


def reads_of(folder: Path, *arguments: object) -> Counter[str]:
    """How often the command reads each file in `folder`, by path from there."""
    READ.clear()
    done = CliRunner().invoke(main, [str(x) for x in arguments], prog_name="qprobe")
    assert done.exit_code == 0, done.output
    return Counter(os.path.relpath(x, folder) for x in READ if Path(x).is_relative_to(folder))


def often(found: Counter[str]) -> dict[str, int]:
    """The reads of scan.json and of units, of `found`, that are too many."""
    allowed = {name: 2 if name.endswith("scan.json") else 1 for name in found}
    kinds = (name for name in found if name.endswith(("scan.json", ".parquet")))
    return {name: found[name] for name in kinds if found[name] > allowed[name]}


@pytest.fixture
def run(scanned: Scanned, tmp_path: Path) -> Path:
    return Path(copytree(scanned("llama").run, tmp_path / "run"))


def interrupt(run: Path) -> None:
    """Leave the run as one that was killed while it measured."""
    (run / "units" / "outputs-00000.parquet").unlink()
    for name in ("layers.csv", "skiplist.json", "frontier.csv"):
        (run / name).unlink()
    (run / "notes" / "end.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("state", [interrupt, lambda run: None], ids=["interrupted", "finished"])
def test_a_scan_reads_each_file_once(
    state: Callable[[Path], None],
    run: Path,
    tiny_folder: TinyFolder,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", write_report)
    monkeypatch.setattr("qprobe.report.write._pictures", lambda *_: {})
    state(run)
    asked = ("--samples", 6, "--max-new-tokens", 5, "--device", "cpu")
    found = reads_of(run, "scan", "--model", tiny_folder("llama"), "--out", run, *asked)
    assert often(found) == {} and found["scan.json"] and found["units/kl-00000.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "reads"),
    [
        (("rank",), "layers.csv"),
        (("rank", "--json"), "layers.csv"),
        (("select", "--budget", "+20%"), "layers.csv"),
        (("report",), "units/outputs-00000.parquet"),
    ],
)
def test_what_follows_a_scan_reads_each_file_once(
    command: tuple[str, ...], reads: str, run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.report.write._pictures", lambda *_: {})
    name, *options = command
    found = reads_of(run, name, run, *options)
    assert often(found) == {} and found["scan.json"] == 1 and found[reads] == 1


@pytest.mark.parametrize("table", ["layers.csv", "ranks.csv", "frontier.csv", "peaks.csv"])
def test_a_table_that_was_cut_is_made_again_from_units_that_are_read_once(table: str, run: Path):
    whole = (run / table).read_bytes()
    (run / table).write_bytes(whole[:-20])
    found = reads_of(run, "rank", run)
    assert often(found) == {} and found["scan.json"]
    assert (run / table).read_bytes() == whole


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_report_against_another_run_reads_each_file_of_both_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = Path(copytree(run, tmp_path / "other"))
    found = reads_of(tmp_path, "report", run, "--against", other)
    assert often(found) == {} and found["run/scan.json"] == found["other/scan.json"] == 1


@pytest.mark.slow
def test_a_comparison_reads_each_file_once(run: Path, tiny_folder: TinyFolder):
    asked = ("--samples", 2, "--max-new-tokens", 3, "--device", "cpu")
    model = ("--model", tiny_folder("llama"))
    found = reads_of(run, "compare", "--manifest", run / "skiplist.json", *model, *asked)
    assert often(found) == {} and (run / "compare.json").is_file()


@pytest.mark.slow
def test_joining_reads_each_file_of_every_run_once(run: Path, tmp_path: Path):
    other, out = Path(copytree(run, tmp_path / "other")), tmp_path / "joined"
    (other / "units" / "kl-00000.parquet").unlink()
    found = reads_of(tmp_path, "join", run, other, "--out", out)
    assert often(found) == {} and found["run/units/kl-00000.parquet"] == 1
    found = reads_of(tmp_path, "join", run, other, "--out", other)  # into one of them
    assert often(found) == {} and found["other/scan.json"] == 1
