"""What a disk or a copy damaged in a run is made again by whoever reads it, set aside, or named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pandas as pd
import pytest
from click.testing import CliRunner

from qprobe.cli import main
from qprobe.errors import RunError
from qprobe.runs.derived import Derived
from qprobe.runs.findings import write_findings
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import SampleKey
from qprobe.runs.units import ablation_stage, candidate_stage
from qprobe.scanning.run import open_run
from qprobe.selection.candidates import frontier
from qprobe.selection.decide import Candidate
from qprobe.selection.derived.ablated import ALONE, KEPT, ablation_again, write_ablation
from qprobe.selection.derived.again import make_again, opened
from qprobe.selection.derived.frontier import write_frontier
from qprobe.selection.request import parse_request
from qprobe.selection.select import scored_run
from tests.runs.runs import four_layers, key_of, make_run, output, rows, spec_of

LAYERS = ("model.a", "model.q", "model.k", "model.b")
BATCH = (SampleKey("h", "h1", True),)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every derived file but ranks.csv: an infinite weight, an ablation, and a frontier by vLLM's
    groups and the propagated error."""
    run = RunFolder(tmp_path_factory.mktemp("again") / "run")
    run.open(replace(key_of(four_layers()), spec=spec_of(held_out=(BATCH,))))
    hurt = {"activation_nonfinite": 1, "propagated_n": 8, "propagated_signal": 1.0, "propagated_nonfinite": 0}
    outputs = [
        output("s", x, 1.0, 0.1 * i, propagated_noise=0.9 / (i + 1), **hurt) for i, x in enumerate(LAYERS)
    ]
    run.write_unit("weights", 0, pd.DataFrame())
    run.write_unit("outputs", 0, pd.DataFrame(outputs))
    asked = frozenset(("model.a",))
    kl = [
        ("s", name, 3, x, 2)
        for name, x in (("standard", 0.5), (ALONE + "model.a", 0.1), (KEPT + "model.a", 0.3))
    ]
    run.write_unit(ablation_stage(asked), 0, rows("kl", *kl))
    write_findings(run)
    write_ablation(run, run.units(ablation_stage(asked)), tuple(asked))
    points = []
    for name, x in frontier(scored_run(run, parse_request(for_tool="vllm")), "propagated_nmse").items():
        stage = candidate_stage(frozenset(x.kept))
        run.write_unit(stage, 0, rows("kl", ("h", stage, 3, 0.5 / (1 + len(x.kept)), 2)))
        points.append(Candidate(name, frozenset(x.kept), x.total_bytes, run.units(stage)))
    write_frontier(run, run.table, points)
    return run.path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(copytree(whole, tmp_path / "run"))


def tables(run: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in run.iterdir() if x.suffix in (".csv", ".json")}


NAMES = ("ablation.csv", "frontier.csv", "layers.csv", "left_out.csv", "peaks.csv")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["cut", "altered", "gone"])
def test_each_table_is_made_again_to_the_byte(run: Path, name: str, how: str):
    before = tables(run)
    assert set(NAMES) < before.keys()
    damaged = {"cut": before[name][:-20], "altered": before[name].replace(b"1", b"2", 1)}
    (run / name).write_bytes(damaged[how]) if how in damaged else (run / name).unlink()
    (sentence,) = make_again(RunFolder(run))
    assert sentence.startswith("Not as written, so made again") and name in sentence
    assert tables(run) == before
    assert make_again(RunFolder(run)) == ()  # said once


def test_a_damaged_list_of_files_has_all_tables_made_again(run: Path):
    before = tables(run)
    (run / "files.json").write_text("{")
    (run / "layers.csv").write_bytes(before["layers.csv"][:50])
    (sentence,) = make_again(RunFolder(run))
    assert all(name in sentence for name in NAMES)
    found = tables(run)
    # Which frontier was drawn nobody can tell now; the first whose lists were measured is.
    assert {n: found[n] for n in NAMES if n != "frontier.csv"} == {
        n: before[n] for n in NAMES if n != "frontier.csv"
    }


@pytest.mark.parametrize("command", ["rank", "select", "report"])
def test_commands_that_read_make_it_again_and_say_so_once(
    run: Path, command: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.report.write.write_report", lambda *_: [])
    before = tables(run)
    (run / "layers.csv").write_bytes(before["layers.csv"][:-30])
    words = [command, str(run), *(["--budget", "+20%"] if command == "select" else [])]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and done.stderr.count("made again from the units") == 1, done.output
    assert (run / "layers.csv").read_bytes() == before["layers.csv"]
    assert "made again" not in CliRunner().invoke(main, words).stderr


def test_python_users_are_told_in_the_notes(run: Path):
    (run / "peaks.csv").write_bytes(b"")
    assert "peaks.csv" in open_run(run).notes[0]


def test_what_units_are_missing_for_stays_and_is_named(run: Path):
    (run / "units" / "outputs-00000.parquet").unlink()
    (run / "layers.csv").write_bytes(b"layer\n")
    assert make_again(RunFolder(run)) == ()
    with pytest.raises(RunError, match=r"layers\.csv is damaged"):
        _ = RunFolder(run).table


def test_a_damaged_unit_is_set_aside_and_named(run: Path):
    unit = run / "units" / "outputs-00000.parquet"
    unit.write_bytes(unit.read_bytes()[:-9])
    (run / "layers.csv").write_bytes(b"layer\n")
    with (
        pytest.raises(RunError, match=r"set aside as NAME\.damaged: outputs-00000\.parquet\. Scan again"),
        opened(run, print),
    ):
        raise AssertionError("not reached")
    assert not unit.exists() and unit.with_name(unit.name + ".damaged").exists()


def test_reading_removes_what_killed_writers_left(run: Path):
    left = run / "units" / ".kl-00000.parquet.0123456789ab.tmp"
    left.write_bytes(b"half")
    with opened(run, print):
        assert not left.exists()


@pytest.mark.parametrize("known", [0, 1, None])
def test_of_two_ablations_the_one_that_the_run_had_is_made_again_or_else_the_first(
    known: int | None, tmp_path: Path
):
    run = RunFolder(make_run(tmp_path / "run"))
    wanted = []
    for layer in sorted(("model.a", "model.b"), key=lambda x: ablation_stage(frozenset((x,)))):
        kl = [("s", name, 3, 0.5, 2) for name in ("standard", ALONE + layer, KEPT + layer)]
        units = rows("kl", *kl)
        run.write_unit(ablation_stage(frozenset((layer,))), 0, units)
        write_ablation(run, units, (layer,))
        wanted.append((run.path / "ablation.csv").read_bytes())
    assert wanted[0] != wanted[1]
    (run.path / "ablation.csv").unlink()
    assert ablation_again(run, None if known is None else Derived.of(wanted[known], 1))
    assert (run.path / "ablation.csv").read_bytes() == wanted[known or 0]
