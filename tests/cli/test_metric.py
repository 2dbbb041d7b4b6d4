"""`--metric` end to end: what a scan and a comparison print follows from the answers that they print."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from click.testing import Result

from qprobe.demo.scenes import scenes

Run = Callable[..., Result]
MODELS = ["16-bit", "nf4", "dynamic"]
SCENES = scenes(6, 3001)
HELD_OUT = (2, 5)  # every third


def rows(path: Path, answers: list[str]) -> Path:
    lines = [
        {"id": x.id, "image": b64encode(x.images[0]).decode(), "prompt": x.prompt, "answer": answer}
        for x, answer in zip(SCENES, answers, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def words(text: str) -> str:
    return " ".join(x.strip(",.:") for x in text.lower().split())


def checked(metric: dict[str, Any], values: dict[str, list[float]]) -> None:
    """Means, differences and their errors of `metric` are those of `values`, by model and sample."""
    count = len(values["16-bit"])
    assert (metric["samples"], metric["left_out"]) == (count, 0)
    assert {k: x["value"] for k, x in metric["means"].items()} == pytest.approx(
        {k: mean(x) for k, x in values.items()}
    )
    for x in metric["differences"]:
        apart = [a - b for a, b in zip(values[x["model"]], values[x["against"]], strict=True)]
        assert x["value"] == pytest.approx(mean(apart))
        assert x["se"] == pytest.approx(stdev(apart) / sqrt(count))


@pytest.mark.slow
def test_metrics_of_scan_and_compare_are_those_of_the_answers_in_the_json(
    qprobe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    whole = [x.answer or "" for x in SCENES]
    phrases = [x.facts[-2].phrase for x in SCENES]
    few = ("--measures", "activation", "--max-new-tokens", "48", "--budget", "+9%", "--batch-size", "6")
    scanned = qprobe(
        *("scan", "--model", "demo-outliers", "--metric", "exact", "--out", tmp_path / "run", *few),
        *("--data", rows(tmp_path / "whole.jsonl", whole), "--json"),
    )
    assert scanned.exit_code == 0, scanned.output
    compared = qprobe(
        *("compare", "--manifest", tmp_path / "run" / "skiplist.json", "--metric", "contains"),
        *(
            "--data",
            rows(tmp_path / "phrases.jsonl", phrases),
            "--max-new-tokens",
            "48",
            "--batch-size",
            "6",
            "--json",
        ),
    )
    assert compared.exit_code == 0, compared.output

    found = json.loads(compared.stdout)
    answers = {name: [x["answers"][name] for x in found["samples"]] for name in MODELS}
    (contains,) = found["metrics"]
    assert contains["name"] == "contains" and list(contains["means"]) == MODELS
    states = {
        name: [float(f" {words(p)} " in f" {words(a)} ") for p, a in zip(phrases, given, strict=True)]
        for name, given in answers.items()
    }
    checked(contains, states)
    # The loaded models give the answers that the scan scored, on its held-out samples.
    exact = json.loads(scanned.stdout)["metric"]
    assert exact["name"] == "exact" and list(exact["means"]) == MODELS
    same = {name: [float(given[i].strip() == whole[i]) for i in HELD_OUT] for name, given in answers.items()}
    checked(exact, same)
