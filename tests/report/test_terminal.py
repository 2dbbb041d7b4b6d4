"""Tables and spark lines: they fit, they lose no spike, they say what was not measured."""

from math import nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe.report import terminal
from qprobe.report.names import short_names
from tests.report.tables import layer_names, layer_table

COMPARISON = {
    "rows": [
        {"name": "16-bit", "parameter_bytes": 21_340_441_670, "total_bytes": 21_340_441_670, "kl": 0.0,
         "kl_se": None, "top1_agreement": 1.0, "answer_agreement": 1.0},
        {"name": "nf4", "parameter_bytes": 7_027_379_270, "total_bytes": 7_178_803_270, "kl": 0.375,
         "kl_se": 0.02, "top1_agreement": 0.8, "answer_agreement": 0.5},
    ],
    "metrics": [
        {"name": "facts", "is_share": True, "samples": 50, "left_out": 10,
         "means": {"16-bit": {"value": 0.982, "se": 0.01}, "nf4": {"value": 0.634, "se": 0.04}},
         "differences": [
             {"model": "nf4", "against": "16-bit", "value": -0.348, "se": 0.0412, "is_found": True}]},
        {"name": "characters", "is_share": False, "samples": 60, "left_out": 0,
         "means": {"16-bit": {"value": 12.5, "se": 1.0}, "nf4": {"value": 13.0, "se": 1.0}},
         "differences": [{"model": "nf4", "against": "16-bit", "value": 0.5, "se": 0.3, "is_found": False}]},
    ],
    "samples": [
        {"id": "a", "prompt": "What is it?", "answers": {"16-bit": "a train", "nf4": "a train"}},
        {"id": "b", "prompt": "Where is it?", "answers": {"16-bit": "in a station", "nf4": "a coast " * 40}},
    ],
}  # fmt: skip

DIAGNOSIS = {
    "ok": True, "qprobe": "0.1.0", "python": "3.11.7", "system": "Linux x86_64, 2 cores",
    "packages": [
        {"name": f"package{i}", "version": "1.0", "wanted": ">=1", "satisfied": True} for i in range(15)
    ],
    "devices": [
        {"name": "cpu", "title": "x86_64", "total_bytes": 2**34, "free_bytes": 2**33, "dtype": "bfloat16",
         "four_bit": {"ok": True, "roundtrip_error": 0.15, "roundtrip_bound": 0.156, "matmul_error": 0.1,
                      "error": None}},
        {"name": "cuda:0", "title": "Tesla V100-SXM2-16GB", "total_bytes": 2**34, "free_bytes": 2**33,
         "dtype": "float16",
         "four_bit": {"ok": False, "roundtrip_error": None, "roundtrip_bound": 0.152, "matmul_error": None,
                      "error": "RuntimeError: no kernel image"}},
    ],
    "hub": {"status": "offline", "detail": "HF_HUB_OFFLINE is set", "logged_in": False},
    "problems": [{"what": "4-bit work fails on cuda:0.", "advice": "Reinstall bitsandbytes."}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (7_027_379_270, "6.54 GiB"), (-2048, "-2.00 KiB")],
)
def test_bytes_are_said_in_binary_units(count: int, said: str):
    assert terminal.readable_bytes(count) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(nan, "-"), (None, "-"), (0.0, "0"), (0.012345, "0.0123"), (1.23456e-5, "1.23e-05"), (-0.5, "-0.5")],
)
def test_numbers_have_three_digits_and_unmeasured_ones_a_dash(value: float | None, said: str):
    assert terminal.readable_number(value) == said


def test_spark_line_is_linear_from_zero():
    # 8 levels: 0 -> 1st, 0.5 -> 5th, 1 -> 8th
    assert terminal.spark_line([0.0, 0.5, 1.0], 10) == "▁▅█"


def test_spark_line_leaves_unmeasured_layers_blank():
    assert terminal.spark_line([nan, 1.0, nan], 10) == " █ "
    assert terminal.spark_line([nan], 10) == " "
    assert terminal.spark_line([], 10) == ""


@given(st.integers(1, 700), st.integers(1, 120), st.data())
def test_spark_line_never_loses_the_spike(count: int, width: int, data: st.DataObject):
    spike = data.draw(st.integers(0, count - 1))
    values = [0.0] * count
    values[spike] = 5.0
    line = terminal.spark_line(values, width)
    assert len(line) == min(count, width)
    assert line.count("█") == 1 and line.count("▁") == len(line) - 1


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("count", [30, 600])
def test_ranking_fits_the_terminal(width: int, count: int):
    table = layer_table(count)
    text = terminal.rank_text(table.head(20), "sensitivity_kl", frozenset(table["layer"][:2]), width)
    lines = text.splitlines()
    assert len(lines) == 22 and max(map(len, lines)) <= width
    assert lines[0].split()[:4] == ["#", "layer", "tower", "16-bit"]


def test_ranking_shows_the_score_it_ranks_by_and_marks_kept_layers():
    table = layer_table(30)
    lines = terminal.rank_text(table.head(3), "weight_peak", frozenset({table["layer"][1]}), 120).splitlines()
    assert "weight peak" in lines[0]
    assert ["*" in line for line in lines[2:]] == [False, True, False]
    assert all("+5.93 KiB" in line for line in lines[2:])  # 8,192 - 2,116 bytes


def test_ranking_leaves_out_what_was_not_measured():
    table = layer_table(30).assign(sensitivity_kl=np.nan, propagated_nmse=np.nan)
    heading = terminal.rank_text(table.head(3), "activation_nmse", frozenset(), 160).splitlines()[0]
    assert "sensitivity" not in heading and "prop." not in heading and "weight nmse" in heading


@pytest.mark.parametrize("width", [80, 120])
def test_comparison_fits_and_shows_disagreements_first(width: int):
    text = terminal.compare_text(COMPARISON, width, shown=1)
    assert max(map(len, text.splitlines())) <= width
    assert "6.54 GiB" in text and "6.69 GiB" in text and "0.375 ± 0.02" in text and "98.2 %" in text
    lines = " ".join(text.split())
    assert "facts, 50 of 60 samples, paired by sample: nf4 against 16-bit: -34.8 ± 4.1 points." in lines
    assert (
        "characters, 60 samples, paired by sample: nf4 against 16-bit: +0.50 ± 0.30 (no difference found)."
        in lines
    )
    assert "b: Where is it?" in text and "What is it?" not in text


def test_bars_are_linear_from_zero_and_leave_out_what_was_not_measured():
    rows = [
        {"name": n, "kl": kl} for n, kl in (("16-bit", 0.0), ("nf4", 0.4), ("dynamic", 0.11), ("x", None))
    ]
    # 24 columns are 192 eighths: 0.11 / 0.4 of them is 52.8, so 6 whole ones and 5 eighths
    assert terminal.kl_bars({"rows": rows}).splitlines() == [
        "16-bit   ", "nf4      " + 24 * "█", "dynamic  " + 6 * "█" + "▋"
    ]  # fmt: skip
    assert terminal.kl_bars({"rows": rows[:1]}) == "" == terminal.kl_bars({"rows": rows[3:]})


@pytest.mark.parametrize("width", [80, 120])
def test_diagnosis_is_one_screen(width: int):
    text = terminal.doctor_text(DIAGNOSIS, width)
    assert max(map(len, text.splitlines())) <= width and len(text.splitlines()) <= 24
    assert "fails" in text and "Reinstall bitsandbytes." in text
    assert text.endswith("4-bit works on this machine.")


def test_short_names_drop_what_all_names_share():
    names = [
        "model.vision_model.transformer.layers.13.mlp.fc2",
        "model.language_model.layers.8.cross_attn.o_proj",
    ]
    assert list(short_names(names).values()) == ["vision.13.mlp.fc2", "text.8.cross_attn.o_proj"]


@given(
    st.lists(
        st.sampled_from([n for n, _ in layer_names(60)] + ["a.b", "model.a.b", "layers.a.b"]), unique=True
    )
)
def test_short_names_tell_layers_apart(names: list[str]):
    labels = short_names(names)
    assert list(labels) == names and len(set(labels.values())) == len(names)


def test_shortened_keeps_both_ends():
    assert terminal.shortened("abcdefghij", 5) == "ab…ij"
    assert terminal.shortened("abc", 5) == "abc"
