"""The metric of a scan: scored on the held-out samples, against a slow oracle, and told in the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qprobe.checkpoint.load import load_dynamic_4bit, load_standard_4bit
from qprobe.errors import QprobeError
from qprobe.inputs.answers import Batching, answered
from qprobe.inputs.decoder import layout_of
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.reference import load_reference
from qprobe.records import Sample
from qprobe.records import asked as question
from qprobe.scanning import answers
from qprobe.scanning.run import ScanResult
from qprobe.selection.verdict import metric_verdict
from tests.scanning.asked import TinyFolder, options, scan, write_lines

FAST = {"measures": ("activation",), "samples": 9, "batch_size": 1, "max_new_tokens": 6}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine questions, of which the sixth and the ninth, held out like the third, bring an answer."""
    brought: dict[int, str] = {0: "x", 5: "submarine", 8: "a bag"}
    lines = [{"prompt": f"what is {n}"} | ({"answer": brought[n]} if n in brought else {}) for n in range(9)]
    return write_lines(tmp_path / "data.jsonl", *lines)


def run(folder: Path, tmp_path: Path, **changes: Any) -> ScanResult:
    return scan(**options(folder, tmp_path / "run", **FAST, **changes))


def characters(sample: Sample, answer: str) -> int:
    return len(answer)


@pytest.mark.slow
def test_the_answers_scored_are_those_of_the_loaded_models(tiny_folder: TinyFolder, tmp_path: Path):
    folder = tiny_folder("llama")
    lines = [{"prompt": f"what is {n}"} for n in range(9)]
    seen: list[tuple[str, str | None, str]] = []

    def length(sample: Sample, answer: str) -> int:
        seen.append((sample.prompt, sample.answer, answer))
        return len(answer)

    result = run(
        folder, tmp_path, data=write_lines(tmp_path / "d.jsonl", *lines), metric=length, budget="+60%"
    )
    found = result.metric
    assert found is not None and list(found.means) == ["16-bit", "nf4", "dynamic"]
    assert (found.name, found.samples, found.left_out) == ("length", 3, 0)
    asked = [x[0] for x in seen]
    assert asked[:3] == asked[3:6] == asked[6:] and len(seen) == 9
    assert all(given is None for _, given, _ in seen)  # whatever the reference answered is not given
    reference = load_reference(str(folder), "cpu")
    models = {
        "16-bit": reference.model,
        "nf4": load_standard_4bit(str(folder), device="cpu")[0],
        "dynamic": load_dynamic_4bit(result.skiplist, str(folder), "cpu")[0],
    }
    samples = [Sample(prompt, question(prompt)) for prompt in asked[:3]]
    for i, (name, model) in enumerate(models.items()):
        own = [s.answer for s in answered_by(model, reference, samples)]
        assert [x[2] for x in seen[3 * i : 3 * i + 3]] == own
        assert found.means[name].value == pytest.approx(sum(map(len, own)) / 3)
    assert result.verdict.endswith(metric_verdict(found))
    assert json.loads(json.dumps(result.to_json()))["metric"] == json.loads(json.dumps(found.to_json()))


def answered_by(model: Any, reference: Any, samples: list[Sample]) -> list[Sample]:
    processed = ProcessedSamples(reference.processor, model.dtype, layout_of(model))
    return answered(model, processed, samples, Batching(1, 6))


@pytest.mark.slow
def test_only_given_answers_count_and_only_those_are_generated(
    tiny_folder: TinyFolder, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    real = answers.answer_group

    def counting(model: Any, processed: Any, group: Any, *more: Any) -> Any:
        asked.extend(s.prompt for s in group)
        return real(model, processed, group, *more)

    monkeypatch.setattr(answers, "answer_group", counting)
    result = run(tiny_folder("llama"), tmp_path, data=data, metric="exact")
    found = result.metric
    assert found is not None and (found.samples, found.left_out) == (2, 1)
    assert len(set(asked[:6])) == 6  # those without an answer, by the reference
    assert sorted(asked[6:]) == sorted(len(found.means) * ["what is 5", "what is 8"])
    assert any("exact" in note and "without a given answer" in note for note in result.notes)
    before = len(asked)
    again = run(tiny_folder("llama"), tmp_path, data=data, metric="exact")
    assert again.metric == found and len(asked) == before  # what is known is not generated again
    assert run(tiny_folder("llama"), tmp_path, data=data).metric is None


@pytest.mark.slow
def test_without_any_given_answer_it_says_so_and_generates_nothing(tiny_folder: TinyFolder, tmp_path: Path):
    lines = [{"prompt": f"what is {n}"} for n in range(6)]
    data = write_lines(tmp_path / "data.jsonl", *lines)
    plain = run(tiny_folder("llama"), tmp_path, data=data)
    result = run(tiny_folder("llama"), tmp_path, data=data, metric="contains")
    assert result.metric is None and result.verdict == plain.verdict
    assert "contains is not measured on held-out samples: none of them brings a given answer." in result.notes
    assert len(list((result.run / "answers").iterdir())) == 6


@pytest.mark.slow
def test_a_function_that_fails_names_the_sample_and_leaves_the_list(tiny_folder: TinyFolder, tmp_path: Path):
    lines = [{"prompt": f"what is {n}"} for n in range(6)]
    data = write_lines(tmp_path / "data.jsonl", *lines)

    def broken(sample: Sample, answer: str) -> float:
        return float("nan")

    with pytest.raises(
        QprobeError, match=r"metric broken returned nan on sample .*, which is no finite number"
    ):
        run(tiny_folder("llama"), tmp_path, data=data, metric=broken)
    assert (tmp_path / "run" / "skiplist.json").is_file()
    found = run(tiny_folder("llama"), tmp_path, data=data, metric=characters).metric
    assert found is not None and found.samples == 2


def test_wrong_metrics_are_refused_at_the_door(tmp_path: Path):
    with pytest.raises(QprobeError, match="'bleu' is no metric"):
        scan("demo", metric="bleu")
    with pytest.raises(QprobeError, match="--metric does not apply"):
        scan("demo", measures=["weight"], metric="exact", out=tmp_path)
