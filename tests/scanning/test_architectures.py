"""The whole road of a scan, on tiny models of every architecture, from model to checked 4-bit model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from shutil import copytree

import pandas as pd
import pytest

from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.checkpoint.storage import stored_bytes
from qprobe.loading.inventory import linear_modules
from qprobe.loading.reference import load_reference
from qprobe.manifest.read import read_manifest
from qprobe.report.write import write_report
from qprobe.runs.folder import RunFolder
from tests import tiny
from tests.benchmarks.architecture_matrix import texts
from tests.reading import encode
from tests.scanning.asked import Scanned, TinyFolder, options, scan, write_lines

# The contract of layers.csv, written out.
COLUMNS = (
    "layer,tower,group,in_features,out_features,experts,bytes_4bit,bytes_16bit,weight_nmse,weight_sqnr_db,"
    "weight_peak,activation_nmse,activation_sqnr_db,activation_peak,propagated_nmse,sensitivity_kl,"
    "sensitivity_kl_se,isolated_kl,isolated_kl_se,rounding,samples,tokens"
)
KEYS = (
    "run layers samples seconds peak_bytes kl_standard_4bit kl_dynamic attribution_residual skiplist verdict "
    "notes streamed_bytes metric"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_table_has_a_row_a_linear_in_execution_order(
    name: str, scanned: Scanned, tiny_folder: TinyFolder
):
    result = scanned(name)
    lines = (result.run / "layers.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    loaded = load_reference(str(tiny_folder(name)), "cpu")
    linears = linear_modules(loaded.model)
    layers = [line.split(",")[0] for line in lines[1:]]
    assert len(layers) == result.layers and sorted(layers) == sorted(linears)
    called: list[str] = []
    for layer, module in linears.items():
        module.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    loaded.model(**encode(loaded.processor, tiny.questions(name), loaded.model.dtype).inputs)
    order = list(dict.fromkeys(called))
    assert layers[: len(order)] == order


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.GENERATING_NAMES)
def test_everything_is_measured_where_there_is_a_language_head(name: str, scanned: Scanned):
    result, table = scanned(name), RunFolder(scanned(name).run).table
    fixed = {x.name for x in RunFolder(result.run).scan.inventory.layers if x.fixed}
    assert table["experts"].isna().all() and (table["rounding"] == "").all()  # of other layers, other runs
    for column in COLUMNS.replace("experts,", "").split(","):
        empty = set(table.loc[table[column].isna(), "layer"])
        assert empty == (fixed if column.startswith(("sensitivity", "isolated")) else set())
    assert result.kl_standard_4bit is not None and result.kl_standard_4bit > 0
    assert result.kl_dynamic is not None and result.kl_dynamic <= result.kl_standard_4bit
    assert result.attribution_residual is not None and abs(result.attribution_residual) < 0.05
    assert result.samples == 6 and result.verdict.startswith("Standard 4-bit costs a KL of ")


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_manifest_loads_and_its_bytes_are_those_stored(
    name: str, scanned: Scanned, tiny_folder: TinyFolder
):
    path = scanned(name).skiplist
    assert path is not None
    manifest = read_manifest(path)
    model, _ = load_dynamic_4bit(path, str(tiny_folder(name)), "cpu")
    assert stored_bytes(model).total_bytes == manifest.budget.total_bytes <= manifest.budget.limit_bytes
    assert manifest.budget.requested == "+10%"


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.GENERATING_NAMES)
def test_the_manifest_says_what_was_compared(name: str, scanned: Scanned):
    result = scanned(name)
    manifest = read_manifest(result.run / "skiplist.json")
    names = [x.name for x in manifest.compared]
    scores = ("sensitivity_kl", "activation_nmse", "weight_nmse", "sensitivity_kl, additive")
    assert names == ["nothing kept", *(f"by {score}" for score in scores)]
    (chosen,) = [x for x in manifest.compared if x.chosen]
    assert chosen.kl == manifest.quality.kl_dynamic == result.kl_dynamic
    assert chosen.total_bytes == manifest.budget.total_bytes
    assert manifest.compared[0].kl == result.kl_standard_4bit and manifest.quality.samples == 2
    assert all(
        x.kl_se is not None and x.total_bytes <= manifest.budget.limit_bytes for x in manifest.compared
    )
    assert not (result.run / "candidates.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_two_runs_give_the_same_bytes(name: str, scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path):
    first, second = scanned(name).run, scan(**options(tiny_folder(name), tmp_path / "run")).run
    for file in ("layers.csv", "peaks.csv", "ranks.csv", "frontier.csv"):
        assert (first / file).exists() == (second / file).exists()
        if (first / file).exists():
            assert (first / file).read_bytes() == (second / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllama", "llama", "bert"])
def test_a_resumed_run_gives_the_same_table(
    name: str, scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path
):
    whole = scanned(name).run
    run = Path(copytree(whole, tmp_path / "run"))
    units = sorted((run / "units").iterdir())
    # The last batch and the weights are lost, and every second list on held-out samples.
    held_out = [unit for unit in units if unit.name.startswith("heldout")]
    batches = [unit for unit in units if unit not in held_out]
    last = max(unit.stem[-5:] for unit in batches)
    lost = [unit for unit in batches if unit.stem[-5:] == last or "weights" in unit.name] + held_out[::2]
    for path in (*lost, run / "layers.csv", run / "skiplist.json"):
        path.unlink()
    kept = {unit: unit.stat().st_mtime_ns for unit in units if unit not in lost}
    result = scan(**options(tiny_folder(name), run))
    assert (run / "layers.csv").read_bytes() == (whole / "layers.csv").read_bytes()
    assert sorted((run / "units").iterdir()) == units
    assert {unit: unit.stat().st_mtime_ns for unit in kept} == kept  # what was finished is not measured again
    assert result.notes == scanned(name).notes
    assert (run / "skiplist.json").read_bytes() == (whole / "skiplist.json").read_bytes()


@pytest.mark.slow
def test_ranks_come_with_their_intervals(scanned: Scanned):
    run = scanned("llama").run
    ranks = pd.read_csv(run / "ranks.csv")
    assert list(ranks) == ["layer", "rank", "rank_low", "rank_high"]
    assert ranks["layer"].tolist() == RunFolder(run).table["layer"].tolist()
    quantized = ranks.dropna()
    assert len(quantized) == 21 and sorted(quantized["rank"]) == list(range(1, 22))
    assert (quantized["rank_low"] <= quantized["rank_high"]).all()


@pytest.mark.slow
def test_a_model_without_a_language_head_is_measured_on_its_own_output(scanned: Scanned):
    result, table = scanned("bert"), RunFolder(scanned("bert").run).table
    assert any("gives no answers: its damage is a normalized error" in note for note in result.notes)
    layers = table[~table["layer"].str.contains("pooler")]  # which the hidden states do not pass through
    assert layers[["sensitivity_kl", "isolated_kl"]].notna().all(axis=None)
    assert table[["weight_nmse", "activation_nmse", "propagated_nmse"]].notna().all(axis=None)
    assert "costs a normalized error of" in result.verdict and "per token of its output" in result.verdict
    assert result.kl_standard_4bit == pytest.approx(layers["sensitivity_kl"].sum(), rel=0.5)
    assert RunFolder(result.run).scan.readout == "outputs"


def test_the_verdict_says_how_well_the_sensitivities_add_up(scanned: Scanned):
    assert re.search(
        r"The sensitivities add up to the damage within \d+\.\d%\.$",
        scanned("llama").verdict,
    )


def test_the_result_is_the_documented_object(scanned: Scanned):
    data = json.loads(json.dumps(scanned("llama").to_json()))
    assert list(data) == KEYS
    assert list(data["seconds"]) == "load weights answers prepare measure table choose report".split()


@pytest.mark.slow
def test_a_scan_draws_its_report(tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", write_report)
    run = scan(**options(tiny_folder("llama"), tmp_path / "run")).run
    drawn = {path.name for path in (run / "report").iterdir()}
    assert drawn >= {"spikes.png", "spikes.svg", "frontier.png"}


@pytest.mark.slow
def test_linears_that_never_run_are_named_and_stay_empty(tiny_folder: TinyFolder, tmp_path: Path):
    lines = [{"prompt": text} for text in ("a red bag", "name the unit", "which one", "the left bar")]
    data = write_lines(tmp_path / "text.jsonl", *lines)
    result = scan(**options(tiny_folder("qwen2_vl"), tmp_path / "run", data=data))
    table = RunFolder(result.run).table.set_index("layer")
    unmeasured = RunFolder(result.run).scan.unmeasured
    assert set(unmeasured) == {name for name in table.index if ".visual." in name} and unmeasured
    outputs = ["activation_nmse", "activation_peak", "propagated_nmse", "sensitivity_kl", "samples", "tokens"]
    assert table.loc[list(unmeasured), outputs].isna().all(axis=None)
    assert table.loc[list(unmeasured), "weight_nmse"].notna().all()
    assert list(table.index[-len(unmeasured) :]) == list(unmeasured)  # what ran comes first
    assert any(f"{len(unmeasured)} linears never ran" in n and unmeasured[0] in n for n in result.notes)
    reasons = {x.name: x.reason for x in read_manifest(result.run / "skiplist.json").layers}
    assert all(reasons[name] == "not measured on these samples, NF4" for name in unmeasured)


@pytest.mark.slow
def test_layers_that_have_samples_behind_tokens_are_measured_as_if_each_sample_came_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # FSMT computes on (tokens, samples, features); split as (samples, tokens) its two halves would mix.
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    folder = tiny.write_recipe(texts.recipes()["FSMTForConditionalGeneration"], "fsmt", tmp_path / "model")
    rows = [("what is it?", "a cat"), ("a red bag", "two lines cross"), ("read the dial", "seven")]
    data = write_lines(tmp_path / "data.jsonl", *({"prompt": p, "answer": a} for p, a in rows))
    asked = {"data": data, "measures": ("activation", "propagated", "sensitivity"), "nodes": 2}
    alone, together = (
        RunFolder(scan(**options(folder, tmp_path / f"run-{n}", batch_size=n, **asked)).run).table
        for n in (1, 3)
    )
    for column, tolerance in (("activation_nmse", 0.01), ("propagated_nmse", 0.02), ("sensitivity_kl", 0.1)):
        assert alone[column].notna().all(), column
        near = 0.3 * tolerance * alone[column].abs().max()
        wanted = pytest.approx(alone[column].to_numpy(), rel=tolerance, abs=near)
        assert together[column].to_numpy() == wanted, column
