"""What each command prints and writes, on a made-up run folder and made-up results."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
from click.testing import Result

from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Compared, Manifest
from qprobe.manifest.write import write_manifest
from qprobe.runs.folder import RunFolder
from qprobe.runs.units import candidate_stage
from qprobe.scanning.run import Run as FinishedRun
from qprobe.scanning.run import ScanResult
from qprobe.selection.select import select
from tests.report.test_terminal import COMPARISON, DIAGNOSIS
from tests.runs.runs import rows

Run = Callable[..., Result]
Fake = Callable[..., None]


def test_rank_lists_the_worst_layers_first(qprobe: Run, run_folder: Path):
    result = qprobe("rank", run_folder, "--by", "activation_nmse", "--top", "2")
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.split()[0].isdigit()] == ["1", "2"]
    assert lines[-1].startswith("* stays in 16-bit in skiplist.json (")
    assert lines[-1].endswith(" layers, besides lm_head)")


def test_piped_output_is_plain_and_names_layers_in_full(qprobe: Run, run_folder: Path):
    text = qprobe("rank", run_folder).stdout
    assert text.isascii() and text.splitlines()[0].split()[:2] == ["#", "layer"]
    assert "model.language_model.layers.1.self_attn.v_proj" in text  # 17, the first of the ranking


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_spark_line_and_a_table_that_fits(
    qprobe: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch, width: int
):
    monkeypatch.setattr("qprobe.report.terminal.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    lines = qprobe("rank", run_folder).stdout.splitlines()
    assert lines[0] == "sensitivity_kl of 30 layers in execution order:"
    assert lines[1].count("█") == 1 and lines[1].index("█") == 17 and len(lines[1]) == 30
    assert max(map(len, lines)) <= width


def test_rank_as_json_has_every_column(qprobe: Run, run_folder: Path):
    ranked = json.loads(qprobe("rank", run_folder, "--top", "3", "--json").stdout)
    assert ranked["by"] == "sensitivity_kl" and [row["rank"] for row in ranked["rows"]] == [1, 2, 3]
    scores = [row["sensitivity_kl"] for row in ranked["rows"]]
    assert scores == sorted(scores, reverse=True) and ranked["rows"][0]["bytes_16bit"] == 8192


@pytest.mark.parametrize("command", [("rank",), ("select", "--budget", "+5%"), ("report",)])
def test_a_folder_that_is_no_run_is_one_sentence(qprobe: Run, tmp_path: Path, command: tuple[str, ...]):
    result = qprobe(*command, tmp_path / "nothing")
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr


def test_rank_shows_how_sure_the_sensitivity_ranks_are(qprobe: Run, run_folder: Path, tmp_path: Path):
    run = copytree(run_folder, tmp_path / "run")
    layers = [row["layer"] for row in json.loads(qprobe("rank", run, "--json").stdout)["rows"]]
    lines = [f"{name},{i},{max(i - 2, 1)},{i + 7}" for i, name in enumerate(layers, start=1)]
    (run / "ranks.csv").write_text("\n".join(["layer,rank,rank_low,rank_high", *lines]) + "\n")
    rows = json.loads(qprobe("rank", run, "--top", "3", "--json").stdout)["rows"]
    assert [(r["rank"], r["rank_low"], r["rank_high"]) for r in rows] == [(1, 1, 8), (2, 1, 9), (3, 1, 10)]
    text = qprobe("rank", run, "--top", "3").stdout
    assert " 1-8 " in text and "ranks: 90 % interval" in text
    by_activation = qprobe("rank", run, "--by", "activation_nmse").stdout
    assert "1-8" not in by_activation and "interval" not in by_activation


def test_rank_by_an_unknown_column_is_one_sentence(qprobe: Run, run_folder: Path):
    result = qprobe("rank", run_folder, "--by", "beauty")
    assert result.exit_code == 1 and "beauty" in result.stderr


def test_select_writes_a_manifest_within_its_budget(qprobe: Run, run_folder: Path, tmp_path: Path):
    out = tmp_path / "list.json"
    result = qprobe("select", run_folder, "--budget", "+20%", "--out", out)
    assert result.exit_code == 0 and str(out) in result.stdout
    manifest = read_manifest(out)
    assert manifest.budget.requested == "+20%"
    assert manifest.budget.standard_4bit_bytes < manifest.budget.total_bytes <= manifest.budget.limit_bytes
    assert all(name in result.stdout for name in manifest.skip_modules)


def test_select_as_json_prints_the_manifest_it_wrote(qprobe: Run, run_folder: Path, tmp_path: Path):
    out = tmp_path / "list.json"
    result = qprobe("select", run_folder, "--budget", "+20%", "--by", "weight_nmse", "--out", out, "--json")
    assert json.loads(result.stdout) == json.loads(out.read_text())


@pytest.mark.parametrize("width", [80, 120])
def test_select_fits_the_terminal_and_counts_what_standard_4bit_does_not_keep(
    qprobe: Run, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
):
    monkeypatch.setattr("qprobe.report.terminal.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    out = tmp_path / "s.json"
    lines = qprobe("select", run_folder, "--budget", "+20%", "--out", out).stdout.splitlines()
    assert max(map(len, lines[:-1])) <= width  # the last is a path
    assert lines[0].split("  ")[0] == "layer" and "16-bit costs" in lines[0] and "bytes in 16-bit" in lines[0]
    manifest = read_manifest(out)
    beyond = [x for x in manifest.layers if x.precision == "bf16" and x.name != "lm_head"]
    said = " ".join(lines)
    assert f"{len(beyond)} of 29 layers kept in 16-bit, besides lm_head, which standard 4-bit keeps" in said
    assert all(x.reason.split(",")[0].removeprefix("kept: ") in said for x in beyond)


def test_select_says_what_it_replaces_and_keeps_what_was_measured(
    qprobe: Run, run_folder: Path, tmp_path: Path
):
    run = copytree(run_folder, tmp_path / "run")
    target, copy = run / "skiplist.json", run / "skiplist-measured.json"
    old = read_manifest(target)
    quality = replace(old.quality, samples=8, kl_standard_4bit=0.3, kl_dynamic=0.0123)
    compared = (Compared("nothing kept", old.budget.total_bytes, 0.3, None, True),)
    write_manifest(target, replace(old, quality=quality, compared=compared))
    measured = target.read_bytes()
    said = qprobe("select", run, "--budget", "+20%").stdout
    assert (
        f"Replaces the list of `{old.made_by.command}` (measured KL 0.0123), which" in said
        and f"kept as {copy}" in said
    )
    assert copy.read_bytes() == measured != target.read_bytes()
    # The list that replaced it rests on predictions: its command makes it again, and the copy stays.
    again = qprobe("select", run, "--budget", "+5%", "--json")
    assert (
        f"Replaces the list of `qprobe select run --budget +20%`; `qprobe select {run} --budget +20%`"
        in again.stderr
    )
    assert json.loads(again.stdout)["budget"]["requested"] == "+5%" and copy.read_bytes() == measured
    assert "Replaces" not in qprobe("select", run, "--budget", "+5%", "--out", tmp_path / "new.json").stdout


def test_the_command_that_makes_a_list_again_does_it_and_other_lists_are_kept(
    qprobe: Run, run_folder: Path, tmp_path: Path
):
    run, out = copytree(run_folder, tmp_path / "run"), tmp_path / "a list.json"
    common = ("select", run, "--out", out)
    assert qprobe(*common, "--budget", "+20%", "--by", "weight_nmse").exit_code == 0
    first = read_manifest(out)
    said = qprobe(*common, "--budget", "+5%").stdout
    command = said.rpartition("; `")[2].partition("` makes it again")[0]
    assert read_manifest(out) != first
    assert qprobe(*shlex.split(command)[1:]).exit_code == 0
    assert read_manifest(out) == first
    # A list of this command, and one layer changed by hand: nothing makes it again, so it is kept.
    hand = keep_too(first, next(x.name for x in first.layers if x.precision == "nf4"))
    write_manifest(out, hand)
    said = qprobe(*common, "--budget", "+5%").stdout
    assert "a list-before.json" in said and "makes it again" not in said
    assert read_manifest(tmp_path / "a list-before.json") == hand


def test_select_for_vllm_writes_a_list_that_export_takes(qprobe: Run, run_folder: Path, tmp_path: Path):
    common = ("select", run_folder, "--budget", "+20%", "--by", "weight_nmse")
    assert qprobe(*common, "--out", tmp_path / "any.json").exit_code == 0
    refused = qprobe("export", tmp_path / "any.json", "--to", "vllm")
    assert refused.exit_code == 1 and "qprobe select RUN --for vllm" in refused.stderr
    assert qprobe(*common, "--for", "vllm", "--out", tmp_path / "whole.json").exit_code == 0
    assert qprobe("export", tmp_path / "whole.json", "--to", "vllm").exit_code == 0
    whole = read_manifest(tmp_path / "whole.json")
    assert whole.made_by.command.endswith("--by weight_nmse --for vllm")
    said = qprobe(*common, "--out", tmp_path / "whole.json").stdout
    assert f"--by weight_nmse --for vllm --out {tmp_path / 'whole.json'}` makes it again" in said


def keep_too(manifest: Manifest, name: str) -> Manifest:
    """`manifest` with one more layer in 16-bit."""
    layers = tuple(
        replace(x, precision="bf16", bytes=2 * x.shape[0] * x.shape[1]) if x.name == name else x
        for x in manifest.layers
    )
    more = sum(x.bytes for x in layers) - sum(x.bytes for x in manifest.layers)
    total = manifest.budget.total_bytes + more
    budget = replace(manifest.budget, total_bytes=total, limit_bytes=total)
    kept = tuple(x.name for x in layers if x.precision == "bf16")
    return replace(manifest, layers=layers, budget=budget, skip_modules=kept)


@pytest.mark.parametrize(
    "name", ["layers.csv", "scan.json", "units", "report", "frontier.csv", "skiplist-measured.json"]
)
def test_select_replaces_no_other_file_of_the_run(qprobe: Run, run_folder: Path, tmp_path: Path, name: str):
    run = copytree(run_folder, tmp_path / "run")
    if name.startswith("skiplist"):
        (run / name).write_bytes((run / "skiplist.json").read_bytes())
    before = {x: x.read_bytes() for x in run.rglob("*") if x.is_file()}
    result = qprobe("select", run, "--budget", "+5%", "--out", run / name)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert {x: x.read_bytes() for x in run.rglob("*") if x.is_file()} == before


def test_select_makes_a_broken_skip_list_anew(qprobe: Run, run_folder: Path, tmp_path: Path):
    run = copytree(run_folder, tmp_path / "run")
    (run / "skiplist.json").write_text("{")
    assert qprobe("select", run, "--budget", "+5%").exit_code == 0
    assert read_manifest(run / "skiplist.json").budget.requested == "+5%"


def test_select_with_room_for_everything_says_so(qprobe: Run, run_folder: Path, tmp_path: Path):
    said = qprobe("select", run_folder, "--budget", "7GiB", "--out", tmp_path / "s.json").stdout
    assert "All layers fit: the budget 7GiB" in said and "allowed" not in said


def test_select_below_standard_4bit_is_one_sentence(qprobe: Run, run_folder: Path, tmp_path: Path):
    result = qprobe("select", run_folder, "--budget", "1KiB", "--out", tmp_path / "list.json")
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "list.json").exists()


def test_select_for_a_bound_says_what_it_predicts(qprobe: Run, run_folder: Path, tmp_path: Path):
    out = tmp_path / "list.json"
    standard = sum(x.sensitivity_kl or 0.0 for x in read_manifest(run_folder / "skiplist.json").layers)
    bound = f"{0.6 * standard:.3g}"
    result = qprobe("select", run_folder, "--max-kl", bound, "--out", out)
    manifest = read_manifest(out)
    assert result.exit_code == 0 and "for a predicted KL of" in result.stdout
    assert manifest.budget.requested == f"max-kl {bound}" and manifest.quality.kl_predicted <= float(bound)
    assert manifest.budget.limit_bytes == manifest.budget.total_bytes


def test_select_refuses_a_list_for_a_bound_that_measured_above_it(
    qprobe: Run, run_folder: Path, tmp_path: Path
):
    run, out = copytree(run_folder, tmp_path / "run"), tmp_path / "list.json"
    standard = sum(x.sensitivity_kl or 0.0 for x in read_manifest(run / "skiplist.json").layers)
    asked = ("select", run, "--max-kl", f"{0.6 * standard:.3g}", "--out", out)
    assert "and not measured" in qprobe(*asked).stdout
    kept = frozenset(select(run, max_kl=0.6 * standard).skip_modules)
    kept -= {x.name for x in RunFolder(run).inventory.layers if x.fixed}
    for kl, is_above in ((0.5 * standard, False), (0.7 * standard, True)):
        for stage in (candidate_stage(frozenset()), candidate_stage(kept)):
            RunFolder(run).write_unit(stage, 0, rows("kl", ("x", "any", 1, kl, 1)))
        out.unlink()
        result = qprobe(*asked)
        assert result.exit_code == is_above and out.exists() != is_above
        if not is_above:
            assert "Its KL was measured on 1 held-out sample" in result.stdout
            continue
        assert "measured above it, on 1 held-out sample" in result.stderr
        out.touch()


@pytest.mark.parametrize("bound", ["0", "-1", "nan", "1e-9"])
def test_a_bound_that_cannot_be_met_is_one_sentence(
    qprobe: Run, run_folder: Path, tmp_path: Path, bound: str
):
    result = qprobe("select", run_folder, "--max-kl", bound, "--out", tmp_path / "list.json")
    assert result.exit_code == 1 and "--max-kl" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "list.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_report_says_where_its_files_are_and_what_it_lacks(qprobe: Run, run_folder: Path, tmp_path: Path):
    report = json.loads(qprobe("report", run_folder, "--out", tmp_path, "--json").stdout)
    assert [Path(f).name for f in report["files"][:2]] == ["index.html", "spikes.png"]
    assert all(Path(f).exists() for f in report["files"])
    assert report["missing"] == ["KL on held-out samples (frontier)"]
    text = qprobe("report", run_folder, "--out", tmp_path).stdout
    assert f"Page     {tmp_path / 'index.html'}" in text and f"Picture  {tmp_path / 'spikes.png'}" in text
    assert text.splitlines()[-1].startswith("Not measured in this run, so left out: KL on held-out samples")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_report_draws_another_run_beside_this_one(qprobe: Run, run_folder: Path, tmp_path: Path):
    text = qprobe("report", run_folder, "--against", run_folder, "--out", tmp_path).stdout
    assert f"Picture  {tmp_path / 'against.svg'}" in text


def test_scan_ends_with_its_verdict(qprobe: Run, fake: Fake, run_folder: Path):
    found = ScanResult(
        run=run_folder,
        layers=30,
        samples=24,
        seconds={"load": 1.25, "measure": 12.0},
        peak_bytes=2**31,
        kl_standard_4bit=0.3,
        kl_dynamic=0.1,
        attribution_residual=0.01,
        skiplist=run_folder / "skiplist.json",
        verdict="Standard 4-bit costs 0.3 nats; the list brings back 0.2 for 9 % more bytes.",
        notes=("a.txt is no image and was left out.",),
    )
    fake("qprobe.scanning.scan", scan=lambda **_asked: FinishedRun(run_folder, found))
    result = qprobe("scan", "--model", "m")
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.splitlines()[-1] == found.verdict
    for part in (
        "30 linear layers, 24 samples",
        "load 1.2 s",
        "2.00 GiB",
        "a.txt is no image",
        "skiplist.json",
    ):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("steps", "after", "said"),
    [
        (0, 0.5, "Distilling found nothing better than its start, a KL of 0.5 to 16-bit."),
        (1, 0.25, "Distilling in 1 step took the KL to 16-bit from 0.5 to 0.25."),
        (None, None, ""),
    ],
)
def test_finetune_says_what_distilling_gave(
    qprobe: Run, fake: Fake, steps: int | None, after: float | None, said: str
):
    done = {
        "out": "a", "base": "nf4", "start": "zero", "trainable_parameters": 8, "steps": 2,
        "resumed_from": None,
        "optimizer": "adamw_torch", "trained_lines": 3, "seconds": 1.0, "eval_loss": None, "skipped": (),
        "notes": (), "left_out": (), "other_batches": (),
        "distilled": None if steps is None else {"steps": steps, "before": 0.5, "after": after},
    }  # fmt: skip
    fake("qprobe.training.finetune", finetune=lambda **_: SimpleNamespace(to_json=lambda: done))
    result = qprobe("finetune", "f", "--data", "d", "--out", "a", "--distill", "2")
    lines = " ".join(result.stdout.split())
    assert lines.endswith(" ".join(f"on 3 lines, 1.0 s. {said} Nothing was held out.".split()))


def test_compare_prints_the_table_and_answers(qprobe: Run, fake: Fake):
    found = SimpleNamespace(to_json=lambda: COMPARISON, notes=("b.png was left out.",))
    fake("qprobe.checkpoint.comparing.compare", compare=lambda **_asked: found)
    text = qprobe("compare", "--manifest", "f").stdout
    assert (
        "█" not in text
        and "16-bit" in text
        and "nf4" in text
        and "in a station" in text
        and "b.png was left out." in text
    )
    assert json.loads(qprobe("compare", "--manifest", "f", "--json").stdout) == COMPARISON


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_exits_1_if_4bit_works_nowhere(qprobe: Run, fake: Fake, ok: bool, code: int):
    diagnosis = {**DIAGNOSIS, "ok": ok}
    fake("qprobe.loading.doctor", doctor=lambda: SimpleNamespace(ok=ok, to_json=lambda: diagnosis))
    assert qprobe("doctor").exit_code == code
    result = qprobe("doctor", "--json")
    assert result.exit_code == code and json.loads(result.stdout) == diagnosis


def test_models_names_the_embedded_ones(qprobe: Run):
    assert "demo-outliers" in qprobe("models").stdout
    known = {m["alias"]: m for m in json.loads(qprobe("models", "--json").stdout)["models"]}
    assert known["demo"]["hub_id"] is None and known["llama-3.2-11b-vision"]["published_lists"] == [
        "unsloth",
        "llm-compressor",
    ]
