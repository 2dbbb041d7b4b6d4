"""The samples that a merge fits codes to are none of those that judge it."""

from __future__ import annotations

import pytest
import torch

from qprobe.data.sampling import Wanted, choose_samples
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from qprobe.training.merging.calibrated import fitting_samples
from tests import tiny


def prompts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"what is the number {i}?", "answer": f"it is {i}"} for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "wanted", "fitted"),
    [
        (50, 4, range(4, 36)),  # the rows behind those that judge, as many as a scan takes by itself
        (6, 4, [4, 5]),
        (80, 40, range(40, 80)),  # as many as judge
        (4, 4, None),  # none left
        (4, None, None),
    ],
)
def test_codes_are_fitted_to_rows_behind_those_that_judge_else_to_built_in_samples(
    rows, wanted, fitted, tiny_folder
):
    processor = load_processor(resolve(str(tiny_folder("llama"))))
    processed, data = ProcessedSamples(processor, torch.bfloat16), prompts(rows)
    asked = Wanted(data=data, count=wanted)
    judges = choose_samples("m", False, asked, "compare").samples
    assert len(judges) == (wanted or 4)
    found = [x.prompt for x in fitting_samples("m", processed, asked, judges)]
    if fitted is None:
        assert found and not set(found) & {x["prompt"] for x in data}
        assert not set(found) & {x.prompt for x in choose_samples("m", False, Wanted(), "compare").samples}
    else:
        assert found == [data[i]["prompt"] for i in fitted]


def test_a_row_that_judges_is_not_fitted_to_where_the_data_repeats_it(tiny_folder):
    processor = load_processor(resolve(str(tiny_folder("llama"))))
    data = prompts(2) + prompts(3)
    asked = Wanted(data=data, count=3)
    judges = choose_samples("m", False, asked, "compare").samples
    found = fitting_samples("m", ProcessedSamples(processor, torch.bfloat16), asked, judges)
    assert [x.prompt for x in found] == ["what is the number 2?"]


def test_beyond_what_a_scan_takes_by_itself_only_rows_with_answers_are_fitted_to(tiny_folder):
    processor = load_processor(resolve(str(tiny_folder("llama"))))
    processed, data = ProcessedSamples(processor, torch.bfloat16), prompts(48)
    for row in data[::2]:
        del row["answer"]
    asked = Wanted(data=data, count=2)
    judges = choose_samples("m", False, asked, "compare").samples
    found = [x.prompt for x in fitting_samples("m", processed, asked, judges, fit_to=40)]
    assert found == [data[i]["prompt"] for i in (*range(2, 34), 35, 37, 39, 41)]


def test_an_image_that_judges_is_not_fitted_to_under_another_name(tiny_folder, tmp_path):
    processor = load_processor(resolve(str(tiny_folder("qwen2_vl"))))
    for name, number in (("a", 0), ("b", 1), ("c", 0), ("d", 2)):
        (tmp_path / f"{name}.png").write_bytes(tiny.picture(number))
    asked = Wanted(images=tmp_path, count=2)
    judges = choose_samples("m", True, asked, "compare").samples
    assert [x.id for x in judges] == ["a.png", "b.png"]
    found = fitting_samples("m", ProcessedSamples(processor, torch.bfloat16), asked, judges)
    assert [x.id for x in found] == ["d.png"]
