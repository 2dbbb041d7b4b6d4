"""Sizes as text: every line fits the terminal, columns stand below each other, and no figure is lost."""

from __future__ import annotations

from typing import Any

import pytest

from qprobe.report.sizes import models_text, plan_text

GIB = 2**30


def sizes(name: str, layers: int, parameters: int, total: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "layers_4bit": layers, "parameter_bytes": parameters, "total_bytes": total, **more}


def a_plan(scale: int, published: float | None = 0.79) -> dict[str, Any]:
    """A model of 3 * scale bytes in 16-bit, one GiB of them an embedding where scale is GIB."""
    layouts = [
        sizes("16-bit", 0, 3 * scale, 3 * scale, published_gib=None, double_quant=None),
        sizes("nf4", 1234, 19 * scale // 16, 5 * scale // 4, published_gib=published, double_quant=True),
        sizes("nf4-single", 1234, 19 * scale // 16, 21 * scale // 16, published_gib=None, double_quant=False),
    ]
    outside = [
        {"name": f"model.layers.{i}.norm.weight", "tower": "language", "bytes": 1 << 18, "why": "a norm; so"}
        for i in range(40)
    ]
    outside += [{"name": "model.embed_tokens.weight", "tower": "language", "bytes": scale, "why": "a table"}]
    outside += [
        {"name": f"model.{'very_long_name.' * 6}{c}", "tower": "language", "bytes": 1, "why": "a bias"}
        for c in "abcdefghijklmno"
    ]
    return {
        "model": "some-model-7b",
        "hub_id": "owner/some-model-7b",
        "architecture": "SomeForCausalLM",
        "parameters": 3 * scale // 2,
        "linear_layers": 1235,
        "layouts": layouts,
        "towers": [
            {"name": "language", "linear_layers": 1235, "parameters": 3 * scale // 2, "layouts": layouts}
        ],
        "outside": outside,
        "notes": ["A sentence that is long enough to be wrapped where the terminal is not very wide at all."],
    }


@pytest.mark.parametrize("width", [80, 120])
def test_every_line_of_a_plan_fits(width: int) -> None:
    lines = plan_text(a_plan(GIB), width).splitlines()
    assert max(map(len, lines)) <= width


def test_figures_stand_beside_the_published_ones_in_gib() -> None:
    (row,) = [x for x in plan_text(a_plan(GIB), 120).splitlines() if x.startswith("nf4 ")]
    # 19/16 and 5/4 GiB
    assert row.split() == ["nf4", "1,234", "1.1875", "0.79", "1.2500"]


def test_without_published_figures_there_is_no_column_for_them() -> None:
    text = plan_text(a_plan(GIB, published=None), 120)
    assert "published" not in text
    (row,) = [x for x in text.splitlines() if x.startswith("nf4 ")]
    assert row.split() == ["nf4", "1,234", "1.1875", "1.2500"]


def test_a_small_model_is_shown_in_mib() -> None:
    text = plan_text(a_plan(1 << 20), 120)
    assert "GiB" not in text.replace("published GiB", "") and "parameters MiB" in text
    (row,) = [x for x in text.splitlines() if x.startswith("16-bit ")]
    assert row.split() == ["16-bit", "0", "3.0000", "-", "3.0000"]


def test_layers_that_differ_in_their_number_share_a_line_and_the_largest_come_first() -> None:
    lines = plan_text(a_plan(GIB), 120).splitlines()
    start = next(i for i, line in enumerate(lines) if "outside the linears" in line)
    first, second = lines[start + 2 : start + 4]
    assert first.split() == ["1.0000", "1", "model.embed_tokens.weight", "a", "table"]
    # 40 norms of 2^18 bytes are 10 MiB
    assert second.split() == ["0.0098", "40", "model.layers.*.norm.weight", "a", "norm"]
    counts = [int(line.split()[1]) for line in lines[start + 2 :] if line[:1].isdigit()]
    assert sum(counts) == len(a_plan(GIB)["outside"])


def known(alias: str, hub_id: str | None, parameters: int) -> dict[str, Any]:
    more = {"bytes_16bit": 2 * parameters, "nf4_total_bytes": parameters // 2, "access": "open"}
    return {"alias": alias, "hub_id": hub_id, "parameters": parameters, "published_lists": [], **more}


MODELS = [
    known("demo", None, 5_896_075),
    known("internvl3-1b", "OpenGVLab/InternVL3-1B-hf", 938_193_024),
    known("llama-3.2-90b-vision-instruct", "meta-llama/Llama-3.2-90B-Vision-Instruct", 88_593_355_323),
]


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_of_models_fits_and_is_aligned(width: int) -> None:
    head, rule, *rows = models_text(MODELS, width).splitlines()
    assert max(map(len, (head, rule, *rows))) <= width and set(rule) == {"-"}
    place = head.index("params") + len("params")
    for row, parameters in zip(rows, ["5.9 M", "938 M", "88.59 B"], strict=True):
        assert row[:place].endswith(f" {parameters}")
    assert ("hub id" in head) == (width == 120)
    assert rows[0].split()[3:5] == ["0.0110", "0.0027"] and rows[2].split()[3:5] == ["165.02", "41.25"]
