"""`qprobe plan` and `qprobe models` through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from qprobe.manifest.write import write_manifest
from qprobe.models.catalogue import entries
from tests.checkpoint.manifests import every_third, manifest_for

Run = Callable[..., Result]
TinyFolder = Callable[[str], Path]


@pytest.mark.slow
def test_plan_as_json_has_the_figures_of_its_contract(qprobe: Run):
    found = json.loads(qprobe("plan", "--model", "qwen2-vl-2b", "--json").stdout)
    assert (found["model"], found["hub_id"]) == ("qwen2-vl-2b", "Qwen/Qwen2-VL-2B")
    assert (found["parameters"], found["linear_layers"]) == (2_208_985_600, 327)
    layouts = {x["name"]: x for x in found["layouts"]}
    assert layouts["16-bit"]["parameter_bytes"] == 4_417_971_200
    assert layouts["nf4"]["parameter_bytes"] == 1_457_841_152 and layouts["nf4"]["layers_4bit"] == 326


@pytest.mark.slow
def test_plan_as_text_stands_beside_the_published_figures(qprobe: Run):
    result = qprobe("plan", "--model", "qwen2-vl-2b")
    assert result.exit_code == 0 and result.stderr == ""
    rows = {x.split()[0]: x.split() for x in result.stdout.splitlines() if x.startswith(("16-bit ", "nf4 "))}
    assert rows["16-bit"] == ["16-bit", "0", "4.1146", "4.11", "4.1146"]
    assert rows["nf4"] == ["nf4", "326", "1.3577", "1.36", "1.3869"]


@pytest.mark.slow
def test_plan_shows_the_layout_of_a_manifest(qprobe: Run, tiny_folder: TinyFolder, tmp_path: Path):
    folder, path = tiny_folder("mllama"), tmp_path / "skiplist.json"
    written = manifest_for(folder, every_third(folder))
    write_manifest(path, written)
    found = json.loads(qprobe("plan", "--model", folder, "--manifest", path, "--json").stdout)
    assert found["layouts"][-1]["name"] == "manifest" and found["hub_id"] is None
    assert found["layouts"][-1]["total_bytes"] == written.budget.total_bytes
    assert "\nmanifest " in qprobe("plan", "--model", folder, "--manifest", path).stdout


def test_plan_refuses_a_manifest_of_another_model(qprobe: Run, tiny_folder: TinyFolder, tmp_path: Path):
    path = tmp_path / "skiplist.json"
    write_manifest(path, manifest_for(tiny_folder("llama")))
    result = qprobe("plan", "--model", "qwen3-0.6b", "--manifest", path)
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.count("fingerprint") == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "llama-3.2-11b-vison"), "Did you mean llama-3.2-11b-vision"),
        (("--model", "./nowhere"), "No model './nowhere'"),
        (("--model", "nobody/nothing"), "pass a local folder"),
        (("--model", "demo", "--manifest", "nowhere.json"), "no such file"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(qprobe: Run, arguments: tuple[str, ...], said: str):
    result = qprobe("plan", *arguments)
    assert result.exit_code == 1 and result.stdout == "" and said in result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("Error: ")


def test_plan_wants_a_model(qprobe: Run):
    assert qprobe("plan").exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("width", ["80", "120"])
def test_models_and_plans_fit_the_terminal(qprobe: Run, monkeypatch: pytest.MonkeyPatch, width: str):
    monkeypatch.setenv("COLUMNS", width)
    for arguments in (("models",), ("plan", "--model", "qwen2-vl-2b")):
        table = qprobe(*arguments).stdout.rpartition("\n--model also takes")[0] or qprobe(*arguments).stdout
        assert max(map(len, table.splitlines())) <= int(width), arguments


def test_models_as_json_has_the_sizes_of_every_entry(qprobe: Run):
    known = json.loads(qprobe("models", "--json").stdout)["models"]
    assert [m["alias"] for m in known] == [entry.alias for entry in entries()]
    llama = next(m for m in known if m["alias"] == "llama-3.2-11b-vision")
    assert (llama["parameters"], llama["bytes_16bit"]) == (10_670_220_835, 21_340_441_670)
    assert (llama["nf4_parameter_bytes"], llama["nf4_total_bytes"]) == (7_027_379_270, 7_178_803_270)
    assert llama["access"] == "gated" and "hf auth login" in llama["note"]
    assert [(s["layout"], s["gib"]) for s in llama["published_sizes"]] == [
        ("16-bit", 19.87),
        ("nf4", 6.54),
        ("unsloth", 7.23),
    ]


@pytest.mark.slow
def test_plan_says_what_a_scan_takes_here(qprobe: Run):
    asked = ["plan", "--model", "demo", "--scan", "--device", "cpu", "--samples", "12", "--batch-size", "2"]
    found = json.loads(qprobe(*asked, "--tokens", "64", "--tiles", "1", "--json").stdout)["scan"]
    assert (found["model"], found["device"], found["samples"]) == ("demo", "cpu", [8, 4])
    assert found["batch"]["samples"] == 2 and found["batch"]["tokens"] == 64
    assert found["batch"]["vision_rows"] > 0 and found["tune"] is None
    assert set(found["seconds"]) == {"load", "weights", "prepare", "measure", "choose", "report"}
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert found["needed_bytes"] == found["device_bytes"] < found["free_bytes"] and not found["is_streamed"]
    shown = qprobe(*asked, "--max-memory", "2GiB", "--format", "nf4-calibrated").stdout
    assert "A scan here: 12 samples (4 held out) of 512 tokens" in shown and "calibrate " in shown
    assert "with all weights there" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("option", "flag"),
    [("--samples", "--scan"), ("--rank", "--training"), ("--tiles", "--training or --scan")],
)
def test_what_describes_a_step_or_a_scan_is_refused_without(qprobe: Run, option: str, flag: str):
    result = qprobe("plan", "--model", "demo", option, "3")
    assert result.exit_code == 2 and f"{option} describes " in result.stderr
    assert f"pass {flag}." in result.stderr
