"""Weights measured from the files: the numbers of the loaded model, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.cli import main
from qprobe.errors import BudgetError, ModelError, QprobeError, RunError
from qprobe.formats.chunks import row_parts
from qprobe.formats.nf4 import Nf4
from qprobe.loading.inventory import linear_modules
from qprobe.loading.reference import load_reference
from qprobe.manifest.read import read_manifest
from qprobe.measure import files
from qprobe.measure.weights import error_sums
from qprobe.models.headers import SINGLE
from qprobe.report.write import write_report
from qprobe.runs.folder import RunFolder
from qprobe.runs.shards import SKIPLIST
from qprobe.scanning.join import join
from qprobe.selection.select import select
from tests import tiny
from tests.scanning.asked import scan

TinyFolder = Callable[[str], Path]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])


def options(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(folder), "device": "cpu", "out": out, "measures": ("weight",), **changes}


def sharded(folder: Path, to: Path, count: int) -> Path:
    """A copy of a tiny checkpoint with its tensors dealt out to `count` files."""
    copytree(folder, to)
    tensors = load_file(to / SINGLE)
    (to / SINGLE).unlink()
    where = {name: f"model-{i % count:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        part = {name: t for name, t in tensors.items() if where[name] == file}
        save_file(part, to / file, metadata={"format": "pt"})
    (to / f"{SINGLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return to


# Round trips in parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("part", [64, 640, 2**20])
@pytest.mark.parametrize("shape", [(60, 64), (128, 320), (60, 60), (64, 96)])
def test_a_round_trip_in_parts_is_the_whole_one(shape: tuple[int, int], part: int, double_quant: bool):
    # 40960 weights are 640 blocks of 64, more than two of 256 scales.
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    fmt = Nf4(double_quant=double_quant)
    cuts = row_parts(shape, 64, part)
    assert len(cuts) == (1 if shape[1] % 64 else -(-shape[0] // max(1, part // shape[1])))
    found = list(fmt.dequantized_parts([partial(weight.__getitem__, c) for c in cuts], CPU, torch.bfloat16))
    assert torch.equal(torch.cat([w for w, _ in found]), weight)
    assert torch.equal(torch.cat([w for _, w in found]), fmt.pack(weight).unpack())


def test_error_sums_of_many_parts_count_each_element_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qprobe.measure.weights._PART", {"cpu": 3})
    wanted = torch.tensor([[1.0, 2.0, float("nan"), 4.0], [0.0, 0.0, 5.0, 1.0]])
    got = torch.tensor([[1.5, 2.0, 3.0, 4.0], [0.0, -2.0, float("inf"), 1.0]])
    sums, peak = error_sums(wanted, got)
    # Finite pairs: 1 2 4 0 0 1 with the errors 0.5 0 0 0 -2 0.
    assert (sums.n, sums.nonfinite, sums.signal, sums.noise, peak) == (6, 2, 22.0, 4.25, 2.0)
    nothing, peak = error_sums(wanted[:1, 2:3], got[:1, 2:3])
    assert (nothing.n, nothing.nonfinite, peak) == (0, 1, 0.0)


# The scan -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_numbers_are_those_of_the_loaded_model(name: str, tiny_folder: TinyFolder, tmp_path: Path):
    result = scan(**options(sharded(tiny_folder(name), tmp_path / name, 3), tmp_path / "run"))
    table = RunFolder(result.run).table.set_index("layer")
    model = load_reference(str(tiny_folder(name)), "cpu").model
    modules, fmt = linear_modules(model), Nf4()
    assert list(table.index) == list(modules) and result.layers == len(modules)
    for layer, module in modules.items():
        sums, peak = error_sums(module.weight, fmt.pack(module.weight).unpack())
        assert table.loc[layer, "weight_nmse"] == sums.nmse
        assert table.loc[layer, "weight_peak"] == peak
    empty = ["activation_nmse", "activation_peak", "propagated_nmse", "sensitivity_kl", "isolated_kl"]
    assert table[[*empty, "samples", "tokens"]].isna().all(axis=None)
    assert result.samples == 0 and result.kl_standard_4bit is None
    # Its list is chosen, and loads into the model that the fingerprint names.
    manifest = read_manifest(result.run / "skiplist.json")
    assert any("kept: weight_nmse" in x.reason for x in manifest.layers)
    assert manifest.made_by.command.endswith("--measures weight")
    assert any("hardly predicts" in note for note in result.notes)
    load_dynamic_4bit(manifest, str(tiny_folder(name)), "cpu")


@pytest.mark.slow
def test_the_full_scan_has_the_same_weight_columns(tiny_folder: TinyFolder, tmp_path: Path):
    both = [
        scan(**options(tiny_folder("llama"), tmp_path / str(i), **changes))
        for i, changes in enumerate([{}, {"measures": ("activation",), "samples": 4, "max_new_tokens": 3}])
    ]
    columns = ["layer", "weight_nmse", "weight_sqnr_db", "weight_peak", "bytes_4bit", "bytes_16bit", "group"]
    tables = [RunFolder(r.run).table[columns].sort_values("layer", ignore_index=True) for r in both]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_its_report_is_drawn_and_its_layers_rank(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", write_report)
    run = scan(**options(tiny_folder("llama"), tmp_path / "run")).run
    assert {"spikes.png", "spikes.svg"} <= {path.name for path in (run / "report").iterdir()}
    again = select(run, "+20%")
    assert any("kept: weight_nmse" in x.reason for x in again.layers)
    shown = CliRunner().invoke(main, ["rank", str(run)])
    assert shown.exit_code == 0 and "weight nmse" in shown.output


@pytest.mark.slow
def test_one_tensor_is_open_at_a_time_and_read_in_parts(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.formats.chunks.PART", 1024)
    monkeypatch.setattr("qprobe.measure.files._PART", 1024)
    monkeypatch.setattr("qprobe.scanning.opening.reference_of", lambda *_: pytest.fail("the model is loaded"))
    opened, alive, largest, real = [], [], [0], files.open_tensor

    class Watched:
        def __init__(self, stored: Any) -> None:
            self.stored = stored

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stored, name)

        def __getitem__(self, cut: slice) -> torch.Tensor:
            part = self.stored[cut]
            largest[0] = max(largest[0], part.numel())
            return part

    @contextmanager
    def watched(path: Path, name: str) -> Iterator[Any]:
        assert not alive
        with real(path, name) as stored:
            alive.append(name)
            yield Watched(stored)
            alive.pop()
        opened.append(name)

    monkeypatch.setattr(files, "open_tensor", watched)
    # Every linear of this model but down_proj (96 columns, one part of 6144) has rows of whole blocks.
    result = scan(**options(tiny_folder("llama"), tmp_path / "run"))
    assert len(opened) == 2 * result.layers  # once for the digest, once for the numbers
    assert largest[0] == 64 * 96


@pytest.mark.slow
def test_a_file_is_a_unit_and_is_not_measured_twice(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = sharded(tiny_folder("llama"), tmp_path / "llama", 4)
    run = scan(**options(folder, tmp_path / "run")).run
    units = sorted((run / "units").iterdir())
    assert [path.name for path in units] == [f"weights-{i:05d}.parquet" for i in range(4)]
    before = (run / "layers.csv").read_bytes()
    units[2].unlink()
    measured: list[str] = []
    real = files.file_rows
    monkeypatch.setattr(
        "qprobe.scanning.weights.file_rows", lambda path, *a: (measured.append(path.name), real(path, *a))[1]
    )
    scan(**options(folder, run))
    assert measured == ["model-00002.safetensors"] and (run / "layers.csv").read_bytes() == before


@pytest.mark.slow
def test_shares_of_the_files_join_into_the_same_table(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = sharded(tiny_folder("llama_tied"), tmp_path / "llama", 3)
    whole = scan(**options(folder, tmp_path / "whole")).run
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        result = scan(**options(folder, tmp_path / f"part-{rank}"))
        assert result.skiplist is None and "left to the others" in result.verdict
    joined = join([tmp_path / "part-1", tmp_path / "part-0"], tmp_path / "joined")
    assert joined.missing == 0
    assert (joined.run / "layers.csv").read_bytes() == (whole / "layers.csv").read_bytes()
    assert RunFolder(joined.run).scan.unmeasured == RunFolder(whole).scan.unmeasured == ()


@pytest.mark.slow
def test_changed_weights_are_another_scan(tiny_folder: TinyFolder, tmp_path: Path):
    folder = Path(copytree(tiny_folder("llama"), tmp_path / "llama"))
    run = scan(**options(folder, tmp_path / "run")).run
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"differs in 1 place: spec\.weights: "):
        scan(**options(folder, run))


def test_a_weight_that_is_stored_with_another_is_named_and_stays_empty(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(copytree(tiny_folder("llama"), tmp_path / "llama"))
    # As transformers has it for architectures whose files fuse what its modules keep apart.
    halves = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    fused = WeightConverter("mlp.gate_and_up.weight", halves, [Chunk(dim=0)])
    known = {"LlamaForCausalLM": [fused], "legacy": []}
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", known)
    tensors = load_file(folder / SINGLE)
    for layer in range(3):
        parts = [tensors.pop(f"model.layers.{layer}.{half}") for half in halves]
        tensors[f"model.layers.{layer}.mlp.gate_and_up.weight"] = torch.cat(parts)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    result = scan(**options(folder, tmp_path / "run"))
    table = RunFolder(result.run).table.set_index("layer")["weight_nmse"]
    assert len(table.index[table.isna()]) == 6
    assert all(x.endswith(("gate_proj", "up_proj")) for x in table.index[table.isna()])
    assert any("6 linears are not stored as one tensor" in n and "up_proj" in n for n in result.notes)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"max_kl": 0.1}, QprobeError, "--max-kl chooses by sensitivity"),
        ({"by": "sensitivity_kl"}, QprobeError, "needs sensitivity, which --measures weight leaves out"),
        ({"budget": "1GiB!"}, BudgetError, "cannot be read"),
        (
            {"measures": ("weight", "luck")},
            QprobeError,
            "names 'luck', which is no measure.*weight, activation",
        ),
        ({"measures": ()}, QprobeError, "names none"),
    ],
)
def test_what_weights_alone_cannot_be_asked(
    changes: dict[str, Any], error: type[Exception], said: str, tiny_folder: TinyFolder, tmp_path: Path
):
    with pytest.raises(error, match=said):
        scan(**options(tiny_folder("llama"), tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--images", "x"),
        ("--data", "x"),
        ("--prompt", "What?"),
        ("--samples", "3"),
        ("--format", "nf4-calibrated"),
        ("--seed", "1"),
        ("--batch-size", "2"),
        ("--max-new-tokens", "9"),
        ("--nodes", "3"),
        ("--ablate", "all"),
        ("--max-memory", "64GiB"),
    ],
)
def test_options_of_samples_are_refused_by_the_name_that_was_typed(
    option: str, value: str, tiny_folder: TinyFolder, tmp_path: Path
):
    asked = ["scan", "--model", str(tiny_folder("llama")), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [*asked, "--device", "cpu", "--measures", "weight", option, value])
    assert result.exit_code == 1
    assert f"runs no samples, so {option} does not apply. Leave out one of them." in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_every_option_that_bears_on_weights_is_taken(tiny_folder: TinyFolder, tmp_path: Path):
    asked = {"budget": "+20%", "by": "weight_peak", "for_tool": "vllm", "dtype": "float16"}
    manifest = read_manifest(scan(**options(tiny_folder("llama"), tmp_path / "run", **asked)).run / SKIPLIST)
    assert manifest.budget.requested == "+20%" and manifest.format.compute_dtype == "float16"
    assert any("kept: weight_peak" in x.reason for x in manifest.layers)


def test_files_of_another_model_are_told(tiny_folder: TinyFolder, tmp_path: Path):
    folder = Path(copytree(tiny_folder("llama"), tmp_path / "llama"))
    save_file({"other.weight": torch.zeros(4, 4)}, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 30 tensors of LlamaForCausalLM"):
        scan(**options(folder, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "filled", "empty"),
    [
        ("activation", ["activation_nmse"], ["propagated_nmse", "sensitivity_kl"]),
        ("propagated", ["activation_nmse", "propagated_nmse"], ["sensitivity_kl"]),
        ("weight,sensitivity", ["activation_nmse", "sensitivity_kl"], ["propagated_nmse"]),
    ],
)
def test_measures_on_the_command_line(
    asked: str, filled: list[str], empty: list[str], tiny_folder: TinyFolder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    arguments = ["scan", "--model", tiny_folder("llama"), "--out", tmp_path / "run", "--measures", asked]
    arguments += ["--samples", 3, "--max-new-tokens", 3, "--device", "cpu", "--json"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    table = RunFolder(tmp_path / "run").table
    quantized = table[table["layer"] != "lm_head"]
    assert quantized[["weight_nmse", *filled]].notna().all(axis=None)
    assert table[empty].isna().all(axis=None)


def test_an_unknown_measure_is_wrong_usage(tmp_path: Path):
    result = CliRunner().invoke(main, ["scan", "--model", "demo", "--measures", "weight,luck"])
    assert result.exit_code == 2
    assert "'luck' is no measure; name some of weight, activation, propagated, sensitivity" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(1280, 1280), (1024, 4096), (1030, 1024)]
)  # of several parts, some cut off
def test_weights_of_several_parts_have_the_same_error(shape: tuple[int, int], tmp_path: Path):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_file({"w": weight}, tmp_path / "one.safetensors")
    ((*_, n, signal, noise, nonfinite, largest),) = files.file_rows(
        tmp_path / "one.safetensors", {"layer": "w"}, Nf4(), torch.device("cpu"), torch.bfloat16
    )
    sums, peak = error_sums(weight, Nf4().pack(weight).unpack())
    assert (n, largest, nonfinite) == (sums.n, peak, 0)
    assert (signal, noise) == pytest.approx((sums.signal, sums.noise), rel=1e-12)
