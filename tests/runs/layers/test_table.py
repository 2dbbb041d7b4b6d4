"""The layer table: pooled sums, unknown is empty, the cut of the units changes nothing."""

from dataclasses import replace
from math import inf, nan, sqrt
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qprobe.errors import RunError
from qprobe.records import FormatSpec
from qprobe.runs.findings import rerouted_note, write_findings
from qprobe.runs.folder import RunFolder, layer_table
from qprobe.runs.key import key_bytes
from qprobe.runs.layers.table import (
    answer_tokens,
    dtypes,
    experts,
    left_out,
    peaks,
    write_table,
)
from tests.runs.runs import inventory_of, key_of, linear, make_run, output, rows


def test_samples_without_answer_tokens_have_no_count_of_them():
    found = pd.DataFrame({"sample": ["a", "b"], "answer_tokens": [2, 0]})
    assert answer_tokens(found) == {"a": 2} and answer_tokens(found[["sample"]]) == {}


def table_of(folder: Path, **units: list[pd.DataFrame]) -> pd.DataFrame:
    return layer_table(make_run(folder, **units)).set_index("layer")


def test_rows_are_the_linears_in_execution_order_with_the_contracts_columns(tmp_path: Path):
    table = layer_table(make_run(tmp_path / "run"))
    assert " ".join(table.columns) == (
        "layer tower group in_features out_features experts bytes_4bit bytes_16bit weight_nmse "
        "weight_sqnr_db weight_peak activation_nmse activation_sqnr_db activation_peak propagated_nmse "
        "sensitivity_kl sensitivity_kl_se isolated_kl isolated_kl_se rounding samples tokens"
    )
    assert table["layer"].tolist() == ["model.a", "model.q", "model.k", "model.b", "lm_head"]
    b = table.set_index("layer").loc["model.b"]
    assert (b["out_features"], b["in_features"], b["bytes_16bit"]) == (64, 128, 16384)


def test_what_was_not_measured_is_empty_never_zero(tmp_path: Path):
    run = make_run(tmp_path / "run")
    columns = list(dtypes())
    assert layer_table(run)[columns[8:]].replace("", pd.NA).isna().all(axis=None)
    lines = write_table(RunFolder(run)).read_text().splitlines()
    assert lines[1] == "model.a,language,model.a,64,64,,2116,8192" + "," * (len(columns) - 8)


def test_a_weight_that_experts_share_has_their_number_beside_its_features(tmp_path: Path):
    layer = replace(linear("model.experts"), shape=(8, 64, 128))
    row = layer_table(make_run(tmp_path / "run", inventory_of(layer))).iloc[0]
    assert (row["experts"], row["out_features"], row["in_features"]) == (8, 64, 128)
    assert (
        write_table(RunFolder(tmp_path / "run"))
        .read_text()
        .splitlines()[1]
        .startswith("model.experts,language,model.experts,128,64,8,")
    )


def test_nmse_pools_sums_over_samples_before_dividing(tmp_path: Path):
    # (1 + 1) / (100 + 1); a mean of the two ratios would give 0.505
    frame = pd.DataFrame([output("a", "model.a", 100.0, 1.0), output("b", "model.a", 1.0, 1.0)])
    row = table_of(tmp_path / "run", outputs=[frame]).loc["model.a"]
    assert row["activation_nmse"] == 2 / 101
    assert (row["samples"], row["tokens"]) == (2, 4)
    assert row["activation_sqnr_db"] == pytest.approx(17.0329, abs=1e-4)  # 10 log10(50.5)


def test_weights_and_propagated_errors_have_their_own_columns(tmp_path: Path):
    propagated = {
        "propagated_n": 8,
        "propagated_signal": 4.0,
        "propagated_noise": 3.0,
        "propagated_nonfinite": 0,
    }
    row = table_of(
        tmp_path / "run",
        weights=[rows("weights", ("model.a", None, 4096, 1000.0, 1.0, 0, 0.25))],
        outputs=[pd.DataFrame([output("a", "model.a", 2.0, 0.5, **propagated)])],
    ).loc["model.a"]
    assert (row["weight_nmse"], row["weight_peak"], row["propagated_nmse"]) == (0.001, 0.25, 0.75)
    assert row["weight_sqnr_db"] == pytest.approx(30)


def test_a_sample_whose_propagated_error_is_unknown_does_not_spoil_the_others(tmp_path: Path):
    known = {"propagated_n": 8, "propagated_signal": 4.0, "propagated_noise": 1.0, "propagated_nonfinite": 0}
    frame = pd.DataFrame([output("a", "model.a", 1.0, 1.0), output("b", "model.a", 1.0, 1.0, **known)])
    assert table_of(tmp_path / "run", outputs=[frame]).loc["model.a", "propagated_nmse"] == 0.25


def test_a_layer_that_saw_no_token_is_unmeasured(tmp_path: Path):
    silent = output("a", "model.a", 0.0, 0.0, peak=0.0, tokens=0, activation_n=0)
    row = table_of(tmp_path / "run", outputs=[pd.DataFrame([silent])]).loc["model.a"]
    assert row[["activation_nmse", "activation_peak", "samples", "tokens"]].isna().all()


def test_an_exact_copy_scores_zero_and_not_empty(tmp_path: Path):
    run = make_run(tmp_path / "run", outputs=[pd.DataFrame([output("a", "model.a", 2.0, 0.0, peak=0.0)])])
    write_table(RunFolder(run))
    for table in (layer_table(run), RunFolder(run).table):
        row = table.set_index("layer").loc["model.a"]
        assert (row["activation_nmse"], row["activation_sqnr_db"], row["activation_peak"]) == (0, inf, 0)


def test_sensitivity_is_per_answer_token_with_its_ratio_error(tmp_path: Path):
    # r = (3 + 5) / (2 + 2) = 2, residuals 3 - 4 = -1 and 5 - 4 = 1,
    # se^2 = 2 / (2 - 1) * (1 + 1) / 4^2 = 0.25. Check: 1.5 and 2.5 have sd 0.707 / sqrt(2) = 0.5.
    frame = rows("sensitivity", ("a", "model.a", 2, 3.0), ("b", "model.a", 2, 5.0))
    row = table_of(tmp_path / "run", sensitivity=[frame]).loc["model.a"]
    assert (row["sensitivity_kl"], row["sensitivity_kl_se"]) == (2.0, 0.5)


def test_shares_of_layers_that_did_not_always_run_sum_to_the_kl(tmp_path: Path):
    # model.a runs on the image sample alone. KL: (2.0 + 0.5) / (10 + 10); dividing what a adds by the tokens
    # it saw would give 1.5 / 10 + 1.0 / 20 = 0.2.
    frame = rows(
        "sensitivity", ("i", "model.a", 10, 1.5), ("i", "model.b", 10, 0.5), ("t", "model.b", 10, 0.5)
    )
    table = table_of(tmp_path / "run", sensitivity=[frame])
    assert table.loc["model.a", "sensitivity_kl"] == 1.5 / 20
    assert table["sensitivity_kl"].sum() == pytest.approx(2.5 / 20)


def test_a_sample_on_which_one_layer_is_not_finite_is_left_out_of_that_layer_alone(tmp_path: Path):
    frame = rows("sensitivity", ("s", "model.a", 2, nan), ("s", "model.b", 2, 1.0),
                 ("t", "model.a", 3, 6.0), ("t", "model.b", 3, 1.0))  # fmt: skip
    table = table_of(tmp_path / "run", sensitivity=[frame])
    assert table.loc["model.a", "sensitivity_kl"] == 6.0 / 3
    assert table.loc["model.b", "sensitivity_kl"] == 2.0 / 5


def test_isolated_kl_that_is_not_finite_is_named(tmp_path: Path):
    frame = rows("isolated", ("s", "model.a", 2, nan), ("t", "model.a", 2, 1.0))
    found = left_out(RunFolder(make_run(tmp_path / "run", isolated=[frame])))
    assert found.loc[0, "layer"] == "model.a" and found.loc[0, "sensitivity"] == 1
    assert found.loc[0, "samples"] == "s"


def test_ratio_error_weighs_samples_by_their_tokens(tmp_path: Path):
    # r = (1 + 4 + 1) / (1 + 2 + 3) = 1, residuals 0, 2, -2, se^2 = 3 / 2 * 8 / 36 = 1 / 3.
    frame = rows("sensitivity", ("a", "model.a", 1, 1.0), ("b", "model.a", 2, 4.0), ("c", "model.a", 3, 1.0))
    row = table_of(tmp_path / "run", sensitivity=[frame]).loc["model.a"]
    assert row["sensitivity_kl"] == 1.0
    assert row["sensitivity_kl_se"] == pytest.approx(1 / sqrt(3), rel=1e-12)


def test_one_sample_has_a_sensitivity_but_no_error(tmp_path: Path):
    row = table_of(tmp_path / "run", sensitivity=[rows("sensitivity", ("a", "model.a", 2, 3.0))]).loc[
        "model.a"
    ]
    assert row["sensitivity_kl"] == 1.5 and pd.isna(row["sensitivity_kl_se"])


def test_non_finite_values_are_left_out_and_counted(tmp_path: Path):
    run = make_run(
        tmp_path / "run",
        weights=[rows("weights", ("model.q", None, 10, 1.0, 0.5, 3, 0.1))],
        outputs=[pd.DataFrame([output("a", "model.a", 1.0, 0.5, activation_nonfinite=2)])],
        sensitivity=[
            rows("sensitivity", ("a", "model.a", 2, 3.0), ("b", "model.a", 5, nan), ("c", "model.a", 5, inf))
        ],
    )
    assert layer_table(run).set_index("layer").loc["model.a", "sensitivity_kl"] == 1.5
    assert left_out(RunFolder(run)).to_dict("records") == [
        {
            "layer": "model.a", "weight": 0, "activation": 2, "propagated": 0, "sensitivity": 2,
            "samples": "a; b; c",
        },
        {
            "layer": "model.q", "weight": 3, "activation": 0, "propagated": 0, "sensitivity": 0,
            "samples": "",
        },
    ]  # fmt: skip


def test_peak_is_the_maximum_and_remembers_where_it_was(tmp_path: Path):
    frames = [
        pd.DataFrame([output("b", "model.a", 1.0, 0.1, peak=7.0, peak_token=5, peak_kind="vision")]),
        pd.DataFrame(
            [output("a", "model.a", 1.0, 0.1, peak=2.0), output("c", "model.a", 1.0, 0.1, peak=nan)]
        ),
    ]
    run = make_run(tmp_path / "run", outputs=frames)
    assert layer_table(run).loc[0, "activation_peak"] == 7.0
    found = peaks(RunFolder(run))
    assert found.loc[0].tolist() == ["model.a", 7.0, "b", 5, "vision"]
    assert found["layer"].tolist() == layer_table(run)["layer"].tolist()
    assert found.loc[1:, ["activation_peak", "sample", "token", "kind"]].isna().all(axis=None)
    write_table(RunFolder(run))
    assert (run / "peaks.csv").read_text().splitlines()[:3] == [
        "layer,activation_peak,sample,token,kind", "model.a,7.0,b,5,vision", "model.q,,,,",
    ]  # fmt: skip


sample_rows = st.lists(
    st.tuples(
        st.floats(1e-3, 1e6), st.floats(0, 1e3), st.integers(0, 3), st.floats(-1, 1), st.integers(1, 50)
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(table=sample_rows, data=st.data())
def test_neither_order_nor_cut_of_units_changes_a_digit(
    table: list, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    order = data.draw(st.permutations(range(len(table))))
    cut = data.draw(st.integers(1, len(table)))

    def frames(numbers: list[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
        # Peaks tie often, so that their tie rule is tested too.
        picked = [(f"s{i}", *table[i]) for i in numbers]
        outputs = pd.DataFrame([output(s, "model.a", y, e, peak=float(p)) for s, y, e, p, _, _ in picked])
        return outputs, rows("sensitivity", *((s, "model.a", n, kl) for s, _, _, _, kl, n in picked))

    root = tmp_path_factory.mktemp("cut")
    whole = frames(list(range(len(table))))
    parts = [frames(order[i : i + cut]) for i in range(0, len(table), cut)]
    one = make_run(root / "one", outputs=[whole[0]], sensitivity=[whole[1]])
    many = make_run(root / "many", outputs=[x for x, _ in parts], sensitivity=[x for _, x in parts])
    assert write_table(RunFolder(one)).read_bytes() == write_table(RunFolder(many)).read_bytes()
    assert (one / "peaks.csv").read_bytes() == (many / "peaks.csv").read_bytes()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.tuples(st.floats(1e-300, 1e300), st.floats(0, 1e300)), min_size=1, max_size=5))
def test_csv_reads_back_to_the_last_bit(values: list, tmp_path_factory: pytest.TempPathFactory):
    # "NA" and "null" are names that pandas would take for empty cells.
    layers = [linear(name) for name in ("NA", "null", "nan", "a,b", 'q"')][: len(values)]
    frame = pd.DataFrame(
        [output("s", x.name, y, e, peak=e) for x, (y, e) in zip(layers, values, strict=True)]
    )
    run = make_run(tmp_path_factory.mktemp("csv") / "run", inventory_of(*layers), outputs=[frame])
    write_table(RunFolder(run))
    pd.testing.assert_frame_equal(RunFolder(run).table, layer_table(run), check_exact=True)


@pytest.mark.parametrize(
    ("name", "why"), [("none", "does not exist"), ("file", "is a file"), ("empty", "has no scan.json")]
)
def test_a_path_that_is_no_run_folder_is_not_called_an_unfinished_scan(tmp_path: Path, name: str, why: str):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=f"{name} is no run folder: it {why}. Pass the folder of a scan"):
        _ = RunFolder(tmp_path / name).table


def test_a_missing_damaged_or_foreign_table_is_explained(tmp_path: Path):
    run = make_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"has no layers\.csv: its scan has not finished"):
        _ = RunFolder(run).table
    path = write_table(RunFolder(run))
    good = path.read_text()
    for broken in (
        "",
        "\x00",
        "layer\nmodel.a\n",
        good.replace("8192", "many"),
        good.replace("8192", "9" * 60),
        good.replace("tokens", "tok"),
    ):
        path.write_text(broken)
        with pytest.raises(RunError, match="Run the scan again"):
            _ = RunFolder(run).table
    path.write_text(good)
    (run / "scan.json").write_bytes(key_bytes(key_of(inventory_of(linear("another")))))
    with pytest.raises(RunError, match="does not list the 1 layers"):
        _ = RunFolder(run).table


EXPERTS = replace(linear("model.experts"), shape=(2, 64, 64))


def of_expert(sample: str, expert: int, tokens: int, rerouted: int | None) -> dict:
    return output(sample, EXPERTS.name, 1.0, 0.1, expert=expert, tokens=tokens, propagated_rerouted=rerouted)


def test_tokens_that_propagated_error_leaves_out_are_counted_and_told(tmp_path: Path):
    first = replace(linear("model.first"), shape=(1, 64, 64))  # whose tokens all stay, so its 50 do not count
    frame = pd.DataFrame(
        [
            output("a", first.name, 1.0, 0.1, expert=0, tokens=50, propagated_rerouted=0),
            of_expert("a", 0, 5, 1), of_expert("a", 1, 3, 0), of_expert("b", 0, 12, 2),
        ]
    )  # fmt: skip
    run = RunFolder(make_run(tmp_path / "run", inventory_of(first, EXPERTS), outputs=[frame]))
    assert experts(run)["rerouted"].tolist() == [0, 3, 0]
    write_findings(run)
    told = (
        "Propagated error of 1 layer of experts leaves out 3 of 20 tokens (15.0%), which go to other experts"
    )
    assert any(note.startswith(told) for note in run.notes.sentences)


def test_tokens_rerouted_are_empty_where_propagated_error_is_not_measured(tmp_path: Path):
    frame = pd.DataFrame([of_expert("a", 0, 5, None), of_expert("a", 1, 3, None)])
    run = RunFolder(make_run(tmp_path / "run", inventory_of(EXPERTS), outputs=[frame]))
    assert experts(run)["rerouted"].isna().all() and rerouted_note(run) is None


def test_experts_whose_rows_belong_to_no_sample_have_no_tokens_rather_than_none(tmp_path: Path):
    frame = pd.DataFrame([{**dict.fromkeys(of_expert("a", 0, 5, 1)), "sample": "a", "layer": EXPERTS.name}])
    found = experts(RunFolder(make_run(tmp_path / "run", inventory_of(EXPERTS), outputs=[frame])))
    assert len(found) == 2 and found["tokens"].isna().all()


def test_a_layer_whose_rows_belong_to_no_sample_is_not_said_to_have_never_run(tmp_path: Path):
    nothing = dict.fromkeys(output("a", "model.a", 0.0, 0.0))
    frames = [
        pd.DataFrame([{**nothing, "sample": s, "layer": "model.q"}, output(s, "model.a", 2.0, 1.0)])
        for s in "ab"
    ]
    run = RunFolder(make_run(tmp_path / "run", outputs=frames))
    write_findings(run)
    ran = run.notes.get("layers")
    assert "model.q" not in ran.unmeasured and "model.b" in ran.unmeasured
    assert any(
        note
        == "1 linear read rows that belong to no sample, so on 2 samples activation and propagated error "
        "are not measured: model.q."
        for note in ran.notes
    )
    table = run.table.set_index("layer")
    assert pd.isna(table.loc["model.q", "activation_nmse"]) and pd.isna(table.loc["model.q", "tokens"])
    assert table.loc["model.a", "activation_nmse"] == 0.5


def test_units_of_a_layer_that_the_scan_does_not_list_are_refused(tmp_path: Path):
    frame = pd.DataFrame([output("a", "stranger", 1.0, 0.1)])
    with pytest.raises(RunError, match="outputs units of stranger"):
        layer_table(make_run(tmp_path / "run", outputs=[frame]))


def test_what_became_of_each_weight_in_rounding_is_told(tmp_path: Path):
    experts = (EXPERTS, replace(EXPERTS, name="all"))
    layers = (linear("a"), linear("b"), linear("c"), *experts, linear("head", fixed="x"))
    frame = rows(
        "calibration",
        ("a", 5, 0.1, 0.01, "", None), ("b", 5, nan, nan, "it is no better", None),
        (EXPERTS.name, 5, 0.1, 0.01, "", 1), ("all", 5, 0.1, 0.01, "", 0),
    )  # fmt: skip
    run = RunFolder(tmp_path / "run")
    run.open(key_of(inventory_of(*layers), format=FormatSpec("nf4-calibrated")))
    run.write_unit("calibration", 0, frame)
    found = layer_table(run.path).set_index("layer")["rounding"]
    assert found.fillna("").to_dict() == {
        "a": "calibrated", "b": "nearest: it is no better", "c": "nearest: it never ran on these samples",
        EXPERTS.name: "calibrated, 1 of 2 experts to nearest", "all": "calibrated", "head": "",
    }  # fmt: skip
