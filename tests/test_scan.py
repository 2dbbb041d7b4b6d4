"""The whole road of a scan, on tiny models of every architecture and on what is broken in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qprobe.build.load import load_dynamic_4bit
from qprobe.build.storage import stored_bytes
from qprobe.errors import BudgetError, MachineError, ModelError, QprobeError, SampleError
from qprobe.manifest import read_manifest
from qprobe.measure.store import read_scan, read_units
from qprobe.models.inventory import linear_modules
from qprobe.models.reference import load_reference
from qprobe.options import ScanOptions
from qprobe.report.write import write_report
from qprobe.samples.inputs import encode
from qprobe.scan import ScanResult, scan
from qprobe.select.table import read_table
from tests import tiny

# The contract of layers.csv, written out.
COLUMNS = (
    "layer,tower,group,in_features,out_features,nf4_bytes,bf16_bytes,weight_nmse,weight_sqnr_db,weight_peak,"
    "activation_nmse,activation_sqnr_db,activation_peak,propagated_nmse,sensitivity_kl,sensitivity_kl_se,"
    "samples,tokens,alone_kl,alone_kl_se"
)
KEYS = (
    "run layers samples seconds peak_bytes kl_standard_4bit kl_dynamic attribution_residual skiplist verdict "
    "notes streamed_bytes"
).split()

TinyFolder = Callable[[str], Path]
Scanned = Callable[[str], ScanResult]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all else here, and have tests of their own."""
    monkeypatch.setattr("qprobe.scan.write_report", lambda _folder: [])


def options(folder: Path, out: Path, **changes: Any) -> ScanOptions:
    return replace(ScanOptions(str(folder), samples=6, max_new_tokens=5, device="cpu", out=out), **changes)


@pytest.fixture(scope="module")
def scanned(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Scanned:
    """`scanned(name)`: a scan of that tiny model, made once. Tests must not change its folder."""
    done: dict[str, ScanResult] = {}

    def make(name: str) -> ScanResult:
        if name not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("qprobe.scan.write_report", lambda _folder: [])
                done[name] = scan(options(tiny_folder(name), tmp_path_factory.mktemp(name) / "run"))
        return done[name]

    return make


# Every architecture, from model to checked 4-bit model ---------------------------------------------------


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


@pytest.mark.parametrize("name", tiny.GENERATING_NAMES)
def test_everything_is_measured_where_there_is_a_language_head(name: str, scanned: Scanned):
    result, table = scanned(name), read_table(scanned(name).run)
    fixed = {x.name for x in read_scan(result.run).inventory.layers if x.fixed}
    for column in COLUMNS.split(","):
        empty = set(table.loc[table[column].isna(), "layer"])
        assert empty == (fixed if column.startswith(("sensitivity", "alone")) else set())
    assert result.kl_standard_4bit is not None and result.kl_standard_4bit > 0
    assert result.kl_dynamic is not None and result.kl_dynamic <= result.kl_standard_4bit
    assert result.attribution_residual is not None and abs(result.attribution_residual) < 0.05
    assert result.samples == 6 and result.verdict.startswith("Standard 4-bit costs a KL of ")


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


@pytest.mark.parametrize("name", tiny.NAMES)
def test_two_runs_give_the_same_bytes(name: str, scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path):
    first, second = scanned(name).run, scan(options(tiny_folder(name), tmp_path / "run")).run
    for file in ("layers.csv", "peaks.csv", "ranks.csv", "frontier.csv"):
        assert (first / file).exists() == (second / file).exists()
        if (first / file).exists():
            assert (first / file).read_bytes() == (second / file).read_bytes()


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
    result = scan(options(tiny_folder(name), run))
    assert (run / "layers.csv").read_bytes() == (whole / "layers.csv").read_bytes()
    assert sorted((run / "units").iterdir()) == units
    assert {unit: unit.stat().st_mtime_ns for unit in kept} == kept  # what was finished is not measured again
    assert result.notes == scanned(name).notes
    first, again = (read_manifest(folder / "skiplist.json") for folder in (whole, run))
    assert replace(again, made_by=first.made_by) == first


def test_ranks_come_with_their_intervals(scanned: Scanned):
    run = scanned("llama").run
    ranks = pd.read_csv(run / "ranks.csv")
    assert list(ranks) == ["layer", "rank", "rank_low", "rank_high"]
    assert ranks["layer"].tolist() == read_table(run)["layer"].tolist()
    quantized = ranks.dropna()
    assert len(quantized) == 21 and sorted(quantized["rank"]) == list(range(1, 22))
    assert (quantized["rank_low"] <= quantized["rank_high"]).all()


def test_a_model_without_a_language_head_is_told_what_does_not_apply(scanned: Scanned):
    result, table = scanned("bert"), read_table(scanned("bert").run)
    assert any(
        "Sensitivity and KL do not apply" in note and "no language head" in note for note in result.notes
    )
    assert table[["sensitivity_kl", "sensitivity_kl_se"]].isna().all(axis=None)
    assert table[["weight_nmse", "activation_nmse", "propagated_nmse"]].notna().all(axis=None)
    assert result.kl_standard_4bit is None and "chosen by activation_nmse alone" in result.verdict
    assert read_manifest(result.run / "skiplist.json").compared == ()
    assert not (result.run / "ranks.csv").exists()


def test_the_result_is_the_documented_object(scanned: Scanned):
    data = json.loads(json.dumps(scanned("llama").to_json()))
    assert list(data) == KEYS
    assert list(data["seconds"]) == [
        "load",
        "weights",
        "answers",
        "prepare",
        "measure",
        "table",
        "choose",
        "report",
    ]


def test_a_scan_draws_its_report(tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qprobe.scan.write_report", write_report)
    run = scan(options(tiny_folder("llama"), tmp_path / "run")).run
    drawn = {path.name for path in (run / "report").iterdir()}
    assert drawn >= {"spikes.png", "spikes.svg", "frontier.png"}


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_linears_that_never_run_are_named_and_stay_empty(tiny_folder: TinyFolder, tmp_path: Path):
    lines = [{"prompt": text} for text in ("a red bag", "name the unit", "which one", "the left bar")]
    data = write_lines(tmp_path / "text.jsonl", *lines)
    result = scan(options(tiny_folder("qwen2_vl"), tmp_path / "run", data=data))
    table = read_table(result.run).set_index("layer")
    unmeasured = read_scan(result.run).unmeasured
    assert set(unmeasured) == {name for name in table.index if ".visual." in name} and unmeasured
    outputs = ["activation_nmse", "activation_peak", "propagated_nmse", "sensitivity_kl", "samples", "tokens"]
    assert table.loc[list(unmeasured), outputs].isna().all(axis=None)
    assert table.loc[list(unmeasured), "weight_nmse"].notna().all()
    assert list(table.index[-len(unmeasured) :]) == list(unmeasured)  # what ran comes first
    assert any(f"{len(unmeasured)} linears never ran" in n and unmeasured[0] in n for n in result.notes)
    reasons = {x.name: x.reason for x in read_manifest(result.run / "skiplist.json").layers}
    assert all(reasons[name] == "not measured on these samples, NF4" for name in unmeasured)


# Ablation and bounds ------------------------------------------------------------------------------------


def test_ablation_of_the_most_sensitive_layers(scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path):
    run = Path(copytree(scanned("llama").run, tmp_path / "run"))
    steps: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "ablation":
            steps.append((done, total))

    result = scan(options(tiny_folder("llama"), run, ablate="3"), progress)
    frame = pd.read_csv(run / "ablation.csv")
    assert list(frame) == ["layer", "kl_alone", "kl_alone_se", "kl_saved", "kl_saved_se", "samples"]
    ranks = pd.read_csv(run / "ranks.csv").set_index("layer")["rank"]
    assert sorted(ranks[frame["layer"]]) == [1, 2, 3]
    assert frame["layer"].tolist() == [x for x in read_table(run)["layer"] if x in set(frame["layer"])]
    assert (frame["kl_alone"] > 0).all() and (frame["samples"] == 4).all()
    assert steps[-1][0] == steps[-1][1] and result.seconds["ablate"] > 0
    # The same units again: nothing is measured twice.
    steps.clear()
    before = (run / "ablation.csv").read_bytes()
    scan(options(tiny_folder("llama"), run, ablate=" , ".join(frame["layer"][::-1])), progress)
    assert steps == [] and (run / "ablation.csv").read_bytes() == before


def test_ablation_of_all_layers_leaves_out_the_fixed_ones(tiny_folder: TinyFolder, tmp_path: Path):
    run = scan(options(tiny_folder("llama_tied"), tmp_path / "run", ablate="all")).run
    frame, inventory = pd.read_csv(run / "ablation.csv"), read_scan(run).inventory
    assert frame["layer"].tolist() == [x.name for x in inventory.layers if not x.fixed]
    # Sensitivities approximate what ablation measures: the same scale, and mostly the same order.
    sensitivity = read_table(run).set_index("layer")["sensitivity_kl"][frame["layer"]]
    between = (frame["kl_alone"] + frame["kl_saved"]) / 2
    assert np.corrcoef(between.rank(), sensitivity.rank())[0, 1] > 0.5


def test_a_bound_on_kl_is_met_on_the_held_out_samples(tiny_folder: TinyFolder, tmp_path: Path):
    result = scan(options(tiny_folder("llama"), tmp_path / "run", max_kl=0.5))
    manifest = read_manifest(result.run / "skiplist.json")
    assert result.kl_dynamic is not None and result.kl_dynamic <= 0.5 < (result.kl_standard_4bit or 0)
    assert manifest.budget.requested == "max-kl 0.5"
    assert manifest.made_by.command.endswith("--max-kl 0.5")
    assert manifest.compared[0].name == "nothing kept" and 2 <= len(manifest.compared) <= 7
    within = [x for x in manifest.compared if x.kl is not None and x.kl <= 0.5]
    (chosen,) = [x for x in manifest.compared if x.chosen]
    assert chosen.total_bytes == min(x.total_bytes for x in within) == manifest.budget.total_bytes
    assert ", within the 0.5 asked for, " in result.verdict
    load_dynamic_4bit(manifest, str(tiny_folder("llama")), "cpu")


def test_a_bound_that_standard_4bit_meets_keeps_nothing(tiny_folder: TinyFolder, tmp_path: Path):
    result = scan(options(tiny_folder("llama"), tmp_path / "run", max_kl=50.0))
    manifest = read_manifest(result.run / "skiplist.json")
    assert manifest.skip_modules == ("lm_head",) and result.verdict.endswith("nothing is kept.")
    assert [x.chosen for x in manifest.compared] == [True]


def test_a_bound_out_of_reach_says_the_smallest_that_was_reached(tiny_folder: TinyFolder, tmp_path: Path):
    with pytest.raises(BudgetError, match=r"No list short of 16-bit leaves a KL of 1e-09 .* Pass --max-kl"):
        scan(options(tiny_folder("llama"), tmp_path / "run", max_kl=1e-9))
    assert not (tmp_path / "run" / "skiplist.json").exists()


# What is broken in a model, and what cannot be asked -----------------------------------------------------


def broken_copy(folder: Path, to: Path, weight: str, value: float, row: int | None = None) -> Path:
    """A copy of a tiny model with one element of `weight`, or a whole row, set to `value`."""
    copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    if row is None:
        tensors[weight][3, 5] = value
    else:
        tensors[weight][row] = value
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def assert_no_nan_sums(run: Path) -> None:
    """Every cell is a finite number or empty, none is "nan" or "inf"."""
    text = (run / "layers.csv").read_text().lower()
    assert "nan" not in text and "inf" not in text.replace("in_features", "")


def test_a_nan_weight_is_named_and_left_out(tiny_folder: TinyFolder, tmp_path: Path):
    # A BERT answers nothing, so that its samples stay although all behind the weight is NaN.
    layer = "encoder.layer.1.intermediate.dense"
    folder = broken_copy(tiny_folder("bert"), tmp_path / "model", f"{layer}.weight", float("nan"))
    result = scan(options(folder, tmp_path / "run"))
    assert any("weights that are not finite" in note and f"{layer} (" in note for note in result.notes)
    assert any(f"first {layer} on question-0" in note for note in result.notes)
    assert any("Propagated error is not measured" in note and "finite" in note for note in result.notes)
    table = read_table(result.run).set_index("layer")
    position = list(table.index).index(layer)
    assert table["activation_nmse"].iloc[:position].notna().all()
    assert table["activation_nmse"].iloc[position:].isna().all() and pd.isna(table["weight_nmse"][layer])
    assert_no_nan_sums(result.run)
    counts = pd.read_csv(result.run / "left_out.csv").set_index("layer")
    assert counts["weight"][layer] > 0 and counts["activation"][layer] > 0
    assert counts["samples"][layer].split("; ")[0].startswith("question-0")


def test_samples_that_a_nan_weight_spoils_are_named_and_the_others_measured(
    tiny_folder: TinyFolder, tmp_path: Path
):
    # The vision tower holds a NaN: the two samples with a picture have no answer, the four others have.
    layer = "model.visual.blocks.0.mlp.fc1"
    folder = broken_copy(
        tiny_folder("qwen2_vl"), tmp_path / "model", f"{file_name(layer)}.weight", float("nan")
    )
    (tmp_path / "a.png").write_bytes(tiny.picture(1))
    texts = [{"prompt": text} for text in ("a red bag", "name the unit", "which one", "the left bar")]
    pictures = [{"id": f"photo-{i}", "image": "a.png", "prompt": "what is it?"} for i in range(2)]
    data = write_lines(tmp_path / "mixed.jsonl", *pictures, *texts)
    result = scan(options(folder, tmp_path / "run", data=data))
    for name in ("photo-0", "photo-1"):
        assert f"{name}: left out, in 16-bit its values are not finite from {layer} on" in result.notes
    assert result.samples == 4 and any(f"{layer} (" in note for note in result.notes)
    table = read_table(result.run).set_index("layer")
    assert table["sensitivity_kl"].filter(like="language_model").notna().all()
    assert result.kl_standard_4bit is not None and np.isfinite(result.kl_standard_4bit)
    assert_no_nan_sums(result.run)


def file_name(layer: str) -> str:
    """The name of a Qwen2-VL vision layer in its files."""
    return layer.removeprefix("model.")


PROMPTS = ("a red bag", "name the unit", "which one is it", "the left bar", "zebra", "a cat", "the moon")


def with_inf_activation(folder: Path, to: Path, position: int, answer: str | None) -> tuple[Path, Path]:
    """(model, data): a Llama whose embedding of one token is infinite, and prompts; one has that token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spoilt = set(tokenizer("zebra", add_special_tokens=False)["input_ids"])
    others = [p for p in PROMPTS if p != "zebra"]
    for text in (*others, "the right one"):
        spoilt -= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    template = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    spoilt -= set(tokenizer(template, add_special_tokens=False)["input_ids"])
    model = broken_copy(folder, to / "model", "model.embed_tokens.weight", float("inf"), min(spoilt))
    others.insert(position, "zebra")
    lines = [{"id": p, "prompt": p, **({"answer": answer} if answer else {})} for p in others]
    return model, write_lines(to / "texts.jsonl", *lines)


def test_a_sample_with_an_inf_activation_is_left_out_of_kl_and_named(tiny_folder: TinyFolder, tmp_path: Path):
    # It brings its answer, so that only measuring shows that it is not finite. Number 1 is calibration.
    model, data = with_inf_activation(tiny_folder("llama"), tmp_path, 1, "the right one")
    result = scan(options(model, tmp_path / "run", data=data, samples=7))
    assert any(
        "1 sample left out of KL and sensitivity, since the answer is not finite in 16-bit: zebra." == note
        for note in result.notes
    )
    assert any("first model.layers.0.self_attn.q_proj on zebra;" in note for note in result.notes)
    assert not any(
        "Propagated" in note for note in result.notes
    )  # measured: the first batch is not the judge
    counts = pd.read_csv(result.run / "left_out.csv").set_index("layer")
    assert (counts["samples"] == "zebra").all() and (counts["sensitivity"].drop("lm_head") == 1).all()
    table = read_table(result.run)
    assert table["activation_nmse"].notna().all() and table["propagated_nmse"].notna().all()
    assert table["sensitivity_kl"].iloc[:-1].notna().all()
    assert_no_nan_sums(result.run)
    rows = read_units(result.run, "kl")
    assert len(rows) == 5 and rows["kl_sum"].isna().sum() == 1


def test_a_held_out_sample_that_is_not_finite_does_not_enter_the_choice(
    tiny_folder: TinyFolder, tmp_path: Path
):
    model, data = with_inf_activation(tiny_folder("llama"), tmp_path, 2, "the right one")
    result = scan(options(model, tmp_path / "run", data=data, samples=7))
    assert any(
        "1 of 2 held-out samples are left out of the choice" in n and "zebra" in n for n in result.notes
    )
    manifest = read_manifest(result.run / "skiplist.json")
    assert manifest.quality.samples == 1 and np.isfinite(manifest.quality.kl_dynamic or np.nan)


def test_the_model_s_own_answer_may_be_what_is_not_finite(tiny_folder: TinyFolder, tmp_path: Path):
    model, data = with_inf_activation(tiny_folder("llama"), tmp_path, 1, None)
    result = scan(options(model, tmp_path / "run", data=data, samples=7))
    where = "model.layers.0.self_attn.q_proj"
    assert f"zebra: left out, in 16-bit its values are not finite from {where} on" in result.notes
    assert result.samples == 6


def test_a_model_that_is_finite_on_no_sample_is_refused_with_the_layer(
    tiny_folder: TinyFolder, tmp_path: Path
):
    layer = "model.layers.1.mlp.down_proj"
    folder = broken_copy(tiny_folder("llama"), tmp_path / "model", f"{layer}.weight", float("nan"))
    with pytest.raises(SampleError, match=rf"None of the 6 samples .* not finite from {layer} on.*--dtype"):
        scan(options(folder, tmp_path / "run"))
    data = write_lines(tmp_path / "d.jsonl", *({"prompt": p, "answer": "the right one"} for p in PROMPTS))
    with pytest.raises(SampleError, match=rf"None of the 4 samples has a finite KL.*{layer} \("):
        scan(options(folder, tmp_path / "again", data=data))
    assert (tmp_path / "again" / "layers.csv").exists()  # the table shows where it begins


def test_what_can_never_be_asked_is_refused_before_anything_is_measured(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def answers(*_: Any) -> None:
        raise AssertionError("the model was asked for answers")

    monkeypatch.setattr("qprobe.scan.prepare_samples", answers)
    for model, changes, said in (
        ("llama", {"budget": "1KiB"}, "below standard 4-bit"),
        ("llama", {"budget": "+5%", "max_kl": 0.1}, "Pass one of them"),
        ("llama", {"max_kl": -1.0}, "no positive number"),
        ("llama", {"by": "beauty"}, "'beauty' is no measure"),
        ("llama", {"ablate": "model.layers.9"}, "no linear layer"),
        ("llama", {"by": "weight_nmse", "max_kl": 0.1}, "predicts no KL"),
        ("bert", {"ablate": "all"}, "no language head, so there is no KL for --ablate"),
        ("bert", {"max_kl": 0.1}, "no language head, so there is no KL for --max-kl"),
    ):
        with pytest.raises(QprobeError, match=said) as caught:
            scan(options(tiny_folder(model), tmp_path / "run", **changes))
        assert isinstance(caught.value, BudgetError | ModelError | QprobeError)
    assert not (tmp_path / "run").exists()


def test_another_request_measures_only_new_lists(
    scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Path(copytree(scanned("llama").run, tmp_path / "run"))
    monkeypatch.setattr("qprobe.measure.held_out.choice_kl", lambda *_: pytest.fail("measured again"))
    result = scan(options(tiny_folder("llama"), run, budget="+10.0%"))
    assert result.notes == scanned("llama").notes  # those of the first choice do not stay behind


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_scan_within_a_memory_limit_gives_the_same_table(
    name: str, scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path
):
    # On a CPU every weight of a block is copied whenever it is used, however large the limit.
    plain = scanned(name)
    limited = scan(options(tiny_folder(name), tmp_path / "run", max_memory="1TiB"))
    assert plain.streamed_bytes is None
    blocks = [x for x in read_scan(limited.run).inventory.layers if not x.fixed]
    assert limited.streamed_bytes > 4 * sum(x.bf16_bytes for x in blocks)
    for file in ("layers.csv", "frontier.csv", "ranks.csv"):
        if (plain.run / file).exists():
            assert (limited.run / file).read_text() == (plain.run / file).read_text()
    assert (limited.kl_standard_4bit, limited.kl_dynamic) == (plain.kl_standard_4bit, plain.kl_dynamic)
    assert read_scan(limited.run).spec == read_scan(plain.run).spec
    assert not list(limited.run.glob(".weight-*"))


def test_a_scan_within_a_memory_limit_resumes_one_without(
    scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path
):
    plain = scanned("llama")
    run = Path(copytree(plain.run, tmp_path / "run"))
    for unit in sorted((run / "units").glob("*-00000.parquet")):
        unit.unlink()
    scan(options(tiny_folder("llama"), run, max_memory="1TiB"))
    assert (run / "layers.csv").read_text() == (plain.run / "layers.csv").read_text()


def test_a_memory_limit_that_is_too_small_is_refused_before_anything_is_measured(
    tiny_folder: TinyFolder, tmp_path: Path
):
    for asked in ({}, {"format": "nf4-calibrated"}):
        with pytest.raises(MachineError, match=r"--max-memory 1,048,576 B is too little: .* or more\."):
            scan(options(tiny_folder("llama"), tmp_path / "run", max_memory="1MiB", **asked))
    with pytest.raises(BudgetError, match="cannot be read"):
        scan(options(tiny_folder("llama"), tmp_path / "run", max_memory="22 apples"))
    assert not (tmp_path / "run").exists()


def test_calibration_within_a_memory_limit_chooses_the_same_codes(tiny_folder: TinyFolder, tmp_path: Path):
    asked = options(tiny_folder("llama"), tmp_path / "plain", format="nf4-calibrated")
    plain = scan(asked)
    limited = scan(replace(asked, out=tmp_path / "limited", max_memory="1TiB"))
    assert read_scan(limited.run).codes == read_scan(plain.run).codes is not None
    assert (limited.run / "layers.csv").read_text() == (plain.run / "layers.csv").read_text()


def test_a_calibrated_scan_resumes_as_it_was_and_refuses_to_mix_with_a_plain_one(
    tiny_folder: TinyFolder, tmp_path: Path
):
    asked = options(tiny_folder("llama"), tmp_path / "run", format="nf4-calibrated")
    first = scan(asked)
    codes = read_scan(first.run).codes
    again = scan(asked)
    assert (again.kl_standard_4bit, again.kl_dynamic) == (first.kl_standard_4bit, first.kl_dynamic)
    assert read_scan(again.run).codes == codes is not None
    manifest = read_manifest(first.skiplist)
    plain = scan(options(tiny_folder("llama"), tmp_path / "plain"))
    # On the same samples standard 4-bit costs what a scan without calibration says it does.
    assert first.kl_standard_4bit == pytest.approx(plain.kl_standard_4bit, rel=1e-6)
    listed = {c.name: c.kl for c in manifest.compared}
    assert listed["standard 4-bit: rounded to nearest, nothing kept"] == first.kl_standard_4bit
    assert listed["nothing kept"] != first.kl_standard_4bit and "(standard 4-bit " in first.verdict
    assert any("does not pay" in n for n in first.notes) == (first.kl_dynamic >= first.kl_standard_4bit)
    assert "calibrate" in first.seconds and first.verdict.startswith("Calibrated 4-bit costs a KL of ")
    with pytest.raises(QprobeError, match=r"format\.name: nf4-calibrated -> nf4"):
        scan(replace(asked, format="nf4"))
