"""Ablation against weights swapped by hand, and its resuming."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan, nan
from pathlib import Path

import pandas as pd
import pytest
import torch

from qprobe.errors import QprobeError
from qprobe.measure.ablation import Ablated, ablated_layers, check_ablated, measure_ablation, parse_ablated
from qprobe.measure.kl import ANSWERS, read_out
from qprobe.options import no_progress
from qprobe.records import Sample
from qprobe.runs.folder import RunFolder
from qprobe.runs.units import ablation_stage
from qprobe.selection.derived.ablated import COLUMNS, ablation_rows, write_ablation
from tests import reference
from tests.measure.conftest import WITH_HEAD, Case
from tests.runs.runs import inventory_of, linear, rows, scan_of

CaseOf = Callable[[str], Case]


def some_layers(case: Case) -> tuple[str, ...]:
    """The first, a middle and the last quantized layer."""
    names = [x.name for x in case.subject.inventory.layers if not x.fixed]
    return names[0], names[len(names) // 2], names[-1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "units").mkdir()
    return tmp_path


def write(run: Path, layers: tuple[str, ...]) -> None:
    folder = RunFolder(run)
    write_ablation(folder, folder.units(ablation_stage(frozenset(layers))), layers)


def table(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "ablation.csv").set_index("layer")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_HEAD)
def test_units_equal_a_hand_made_swap_of_weights_exactly(case: CaseOf, run: Path, name: str) -> None:
    found, layers = case(name), some_layers(case(name))
    subject, samples = found.subject, found.samples[:1]
    measure_ablation(subject, RunFolder(run), [samples], layers, no_progress)
    units = RunFolder(run).units(ablation_stage(frozenset(layers))).set_index("candidate")
    batch = subject.encode(samples)
    with torch.inference_mode():
        plain = read_out(subject.model, batch)
        for layer in layers:
            for candidate, swapped in (
                (f"alone {layer}", {layer}),
                (f"kept {layer}", subject.quantized - {layer}),
                ("standard", subject.quantized),
            ):
                (sums,) = ANSWERS.sums(
                    plain, read_out(reference.quantized_copy(subject.model, swapped), batch)
                )
                row = units.loc[candidate]
                assert (row.kl_sum, row.answer_tokens, row.top1_agree) == (
                    sums.kl,
                    sums.tokens,
                    sums.top1_agree,
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllama", "llama_tied"])
def test_the_table_equals_a_slow_oracle(case: CaseOf, run: Path, name: str) -> None:
    found, layers = case(name), some_layers(case(name))
    subject = found.subject
    measure_ablation(subject, RunFolder(run), [(s,) for s in found.samples], layers, no_progress)
    write(run, layers)
    result = table(run)
    assert list(result.index) == list(layers) and list(result.columns) == list(COLUMNS[1:])
    assert (result["samples"] == 3).all()
    for layer in layers:
        alone, saved, tokens = 0.0, 0.0, 0
        for sample in found.samples:
            batch = subject.encode((sample,))
            sums = reference.ablation_kl(
                subject.model, subject.quantized, layer, batch.inputs, batch.answers[0]
            )
            alone, saved, tokens = alone + sums[0], saved + sums[1], tokens + batch.answer_tokens
        assert result.kl_isolated[layer] == pytest.approx(alone / tokens, rel=1e-3, abs=1e-7)
        assert result.kl_saved[layer] == pytest.approx(saved / tokens, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_an_interrupted_ablation_goes_on_where_it_stopped(case: CaseOf, tmp_path: Path) -> None:
    found, layers = case("llama"), some_layers(case("llama"))
    groups: list[tuple[Sample, ...]] = [(s,) for s in found.samples]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        (folder / "units").mkdir(parents=True)
    steps: list[tuple[int, int]] = []

    def stop_in_the_second_batch(stage: str, done: int, total: int) -> None:
        if done == len(layers) + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_ablation(found.subject, RunFolder(broken), groups, layers, stop_in_the_second_batch)
    assert all("forward" not in m.__dict__ for m in found.subject.model.modules())
    assert len(list((broken / "units").iterdir())) == 1
    measure_ablation(
        found.subject, RunFolder(broken), groups, layers, lambda _, done, total: steps.append((done, total))
    )
    assert steps == [(i, 9) for i in range(4, 10)]  # three layers a batch; the first batch is not run again
    measure_ablation(found.subject, RunFolder(whole), groups, layers, no_progress)
    write(broken, layers)
    write(whole, layers)
    assert (broken / "ablation.csv").read_bytes() == (whole / "ablation.csv").read_bytes()


def test_the_saved_kl_is_paired_and_leaves_out_what_is_not_finite():
    # Sample c has no finite KL with "a" alone. Saved on a and b: 4 - 1 and 2 - 2 over 2 + 3 tokens.
    units = rows(
        "kl",
        ("a", "standard", 2, 4.0, 1), ("b", "standard", 3, 2.0, 1), ("c", "standard", 5, 9.0, 1),
        ("a", "alone l", 2, 0.5, 1), ("b", "alone l", 3, 0.25, 1), ("c", "alone l", 5, nan, 1),
        ("a", "kept l", 2, 1.0, 1), ("b", "kept l", 3, 2.0, 1), ("c", "kept l", 5, 1.0, 1),
    )  # fmt: skip
    (row,) = ablation_rows(units, ("l",)).to_dict("records")
    assert (row["layer"], row["kl_isolated"], row["kl_saved"], row["samples"]) == ("l", 0.15, 0.6, 2)
    assert row["kl_saved_se"] > 0 and isnan(
        ablation_rows(units[units["sample"] == "a"], ("l",)).kl_saved_se[0]
    )


INVENTORY = inventory_of(linear("model.a"), linear("model.b"), linear("lm_head", fixed="lm_head"))


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        (" all ", "all"),
        ("1", 1),
        ("900", 900),
        ("model.a", ("model.a",)),
        ("model.b, model.a,", ("model.b", "model.a")),
    ],
)
def test_what_can_be_asked(asked: str, meant: Ablated) -> None:
    assert parse_ablated(asked) == meant
    check_ablated(meant, INVENTORY)  # raises nothing


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("0", "measures no layer"),
        ("", "names no layer"),
        (" , ", "names no layer"),
        ("-3", "--ablate -3 measures no layer"),
        ("model.c", r"names 'model\.c', which is no linear layer"),
        ("model.a,lm_head", r"names lm_head, which is never in 4-bit \(lm_head\)"),
    ],
)
def test_what_cannot_be_asked_is_explained(asked: str, said: str) -> None:
    with pytest.raises(QprobeError, match=said):
        check_ablated(parse_ablated(asked), INVENTORY)


def test_layers_are_ablated_in_execution_order_and_only_those_that_ran_in_4_bit():
    names = ("model.a", "model.b", "model.c", "model.d", "lm_head")
    layers = [linear(x, fixed="lm_head" if x == "lm_head" else None) for x in names]
    scan = scan_of(inventory_of(*layers), unmeasured=("model.c",))
    table = pd.DataFrame({"layer": names, "sensitivity_kl": [0.1, 0.3, 0.9, 0.2, 0.8]})
    asked: dict[Ablated, tuple[str, ...]] = {
        "all": ("model.a", "model.b", "model.d"),
        1: ("model.b",),  # neither model.c, which never ran, nor lm_head, which is never in 4-bit
        2: ("model.b", "model.d"),
        9: ("model.a", "model.b", "model.d"),
        ("model.d", "model.c", "model.a"): ("model.a", "model.d"),
    }
    assert {x: ablated_layers(x, scan, table) for x in asked} == asked
