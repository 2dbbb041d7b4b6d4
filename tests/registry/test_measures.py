"""Another measure, declared and implemented outside the package: it is run, kept, ranked by and shown."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from qprobe.cli import main
from qprobe.errors import QprobeError
from qprobe.registry import measures
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import Measures, Spec
from tests.registry.dummy import COLUMN, MEASURE, STAGE
from tests.scanning.asked import TinyFolder

scan_command = importlib.import_module("qprobe.cli.scan")  # the package has the command by this name


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The dummy measure is declared while a test runs."""
    with monkeypatch.context() as patch:
        patch.setattr(measures, "DECLARED", (*measures.DECLARED, MEASURE))
        importlib.reload(scan_command)
        yield
    importlib.reload(scan_command)


def scan(folder: Path, run: Path, *words: str) -> Result:
    """`qprobe scan` of a tiny model, which must succeed."""
    few = ["--device", "cpu", "--samples", "6", "--max-new-tokens", "5"]
    done = CliRunner().invoke(scan_command.scan, ["--model", str(folder), "--out", str(run), *few, *words])
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.usefixtures("declared")
def test_help_offers_a_declared_measure():
    text = " ".join(CliRunner().invoke(scan_command.scan, ["--help"]).output.split())
    assert "What to measure, of weight, activation, propagated, sensitivity, dummy, with" in text


@pytest.mark.slow
@pytest.mark.usefixtures("declared")
def test_a_declared_measure_is_part_of_a_whole_scan(tiny_folder: TinyFolder, tmp_path: Path):
    run = tmp_path / "run"
    said = scan(tiny_folder("llama"), run).output
    assert RunFolder(run).key.spec.measures == Measures(True, True, others=("dummy",))
    table = pd.read_csv(run / "layers.csv")
    assert list(table).index(COLUMN.name) == list(table).index("isolated_kl_se") + 1
    # The weight error of each layer as often as there are samples, four: a ratio of sums that are exact.
    assert table[COLUMN.name].notna().all() and table[COLUMN.name].equals(table["weight_nmse"])
    assert COLUMN.heading in said
    ranked = CliRunner().invoke(main, ["rank", str(run), "--by", COLUMN.name, "--json"])
    first = table.set_index("layer")[COLUMN.name].idxmax()
    assert ranked.exit_code == 0 and json.loads(ranked.output)["rows"][0]["layer"] == first
    page = (run / "report" / "index.html").read_text()
    assert f'"column":"{COLUMN.name}"' in page and f'"{COLUMN.name}":{float(table[COLUMN.name][0])!r}' in page
    assert COLUMN.label in (run / "report" / "spikes.svg").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("declared", "no_pictures")
def test_a_declared_measure_is_taken_where_it_is_asked_for_and_can_choose(
    tiny_folder: TinyFolder, tmp_path: Path
):
    scan(
        tiny_folder("llama"), tmp_path / "run", "--measures", "dummy", "--by", COLUMN.name, "--budget", "+60%"
    )
    run = RunFolder(tmp_path / "run")
    assert run.key.spec.measures == Measures(False, False, others=("dummy",))
    assert set(run.key.spec.needed_units) == {"weights", "outputs", STAGE.name}
    assert run.table["sensitivity_kl"].isna().all() and run.table[COLUMN.name].notna().all()
    manifest = json.loads((run.path / "skiplist.json").read_text())
    assert any(x["reason"].startswith(f"kept: {COLUMN.name}") for x in manifest["layers"])


def test_needed_units_follow_from_the_declarations():
    batches = ((), ()), ((),)
    spec = Spec(
        "w", "cpu", Measures(False, False, others=("dummy",)), calibration=batches[0], isolated=batches[1]
    )
    assert spec.needed_units == {"weights": 1, "outputs": 2}  # it is not declared here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "DECLARED", (*measures.DECLARED, MEASURE))
        assert spec.needed_units == {"weights": 1, "outputs": 2, STAGE.name: 2}


@pytest.mark.parametrize("name", ["weight_sqnr_db", "activation_sqnr_db"])
def test_decibels_name_the_column_that_adds_up(name: str):
    with pytest.raises(QprobeError, match=rf"{name} is in decibels.* by {name.replace('sqnr_db', 'nmse')}\."):
        measures.check_adds_up(name)
    measures.check_adds_up("weight_peak")
