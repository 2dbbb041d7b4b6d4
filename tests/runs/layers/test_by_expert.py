"""What is said of each expert of a fused weight."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.by_expert import Expert, by_expert, expert_sentences, worst_expert
from tests.runs.runs import inventory_of, linear, make_run, output

EXPERTS = replace(linear("model.experts"), shape=(3, 64, 64))


@pytest.mark.parametrize(
    ("ones", "worst"),
    [
        ([Expert(4, 0.9, 0.1), Expert(5, 0.1, 0.2), Expert(0, 0.9, None)], 1),
        ([Expert(4, 0.1, 0.2), Expert(5, 0.9, 0.2)], 0),  # of equal ones the first
        ([Expert(None, 0.1, None), Expert(None, 0.3, None)], 1),
        ([Expert(None, None, None), Expert(0, None, None)], None),
        ([], None),
    ],
)
def test_the_worst_expert_is_so_on_its_tokens_or_by_its_weights_where_none_ran(
    ones: list[Expert], worst: int | None
):
    assert worst_expert(ones) == worst


def test_a_sentence_for_each_fused_weight_says_what_is_known():
    found = {
        "tokens": [Expert(30, 0.1, 0.05), Expert(1970, 0.1, 0.25), Expert(0, 0.1, None)],
        "all": [Expert(1, 0.1, 0.5)],
        "weights": [Expert(None, 0.125, None), Expert(None, 0.0625, None)],
        "nothing": [Expert(0, None, None)],
    }
    assert expert_sentences(found) == [
        "tokens: of 3 experts 1 errs most, activation_nmse 0.25 on 1,970 of 2,000 tokens; 1 read no token, "
        "so the error of their outputs is unknown.",
        "all: of 1 experts 0 errs most, activation_nmse 0.5 on 1 of 1 token.",
        "weights: of 2 experts 0 errs most, weight_nmse 0.12.",
        "nothing: nothing is known of its 1 expert.",
    ]


def test_the_experts_of_a_run_come_in_their_order_and_what_is_not_known_is_none(tmp_path: Path):
    frame = pd.DataFrame(
        [
            output(s, EXPERTS.name, 2.0, n, expert=e, tokens=t)
            for s, e, t, n in (("a", 2, 3, 1.0), ("b", 0, 4, 0.5))
        ]
    )
    run = RunFolder(make_run(tmp_path / "run", inventory_of(EXPERTS), outputs=[frame]))
    assert by_expert(run) == {
        EXPERTS.name: (Expert(4, None, 0.25), Expert(0, None, None), Expert(3, None, 0.5)),
    }
    dense = pd.DataFrame([output("a", "model.a", 1.0, 0.1)])
    assert by_expert(RunFolder(make_run(tmp_path / "dense", outputs=[dense]))) == {}
