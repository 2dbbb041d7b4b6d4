"""What the damage of a model is measured on, by the kind of its output, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qprobe.errors import ModelError
from qprobe.inputs.batch import PAD, TEXT, Batch
from qprobe.measure.kl import (
    ANSWERS,
    EMBEDDINGS,
    OUTPUTS,
    POOLED,
    TOKENS,
    Readout,
    at_answers,
    readout_of,
    refuse_unread,
    rows_of,
)


def made(name: str, takes: str = "input_ids", head: bool = False, **changes: Any) -> Any:
    """A model of this class name whose forward takes these arguments. changes: attributes and config."""
    config = SimpleNamespace(
        **{"problem_type": None, "num_labels": 3, "is_encoder_decoder": False, **changes.pop("config", {})}
    )
    body: dict[str, Any] = {}
    exec(f"def forward(self, {takes}): pass", body)
    methods: dict[str, Any] = {
        "forward": body["forward"],
        "can_generate": lambda _self: head,
        "get_output_embeddings": lambda _self: nn.Linear(2, 2) if head else None,
        "main_input_name": takes.partition(",")[0],
        **changes,
    }
    model = type(name, (nn.Module,), methods)()
    model.config = config
    return model


REGRESSION = {"problem_type": "regression"}
MULTI = {"problem_type": "multi_label_classification", "num_labels": 5}


@pytest.mark.parametrize(
    ("model", "readout"),
    [
        (made("XForCausalLM", head=True), ANSWERS),
        (made("XForMaskedLM", head=True, can_generate=lambda _: False), TOKENS),
        (made("XForTokenClassification"), TOKENS),
        (made("XForSequenceClassification"), Readout("classes", 1)),
        (made("XForSequenceClassification", config=MULTI), Readout("classes", 5)),
        (made("XForRewardModel"), Readout("classes", 1)),
        (
            made("XForSequenceClassification", config={"problem_type": "regression"}),
            Readout("scores", 1, True),
        ),
        (made("XTextModelWithProjection"), POOLED),
        (made("XModel", get_text_features=1, get_image_features=1), EMBEDDINGS),
        (made("XModel", get_text_features=1), OUTPUTS),
        (made("XModel", get_image_features=1), OUTPUTS),
        (made("XModel"), OUTPUTS),
        (made("XForQuestionAnswering"), None),
        (made("XModel", "input_ids, decoder_input_ids"), None),
    ],
)
def test_the_kind_of_output_is_known_by_class_head_and_arguments(model: Any, readout: Readout | None):
    assert readout_of(model) == readout


class WithExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (made("Hears", "input_features"), r"Hears works on audio \(input_features\)"),
        (made("Talks", "input_ids, user_audio_codes"), r"works on audio \(user_audio_codes\)"),
        (made("Sees", "pixel_values"), "reads pixel_values, and samples here are texts"),
        (
            made("T", "input_ids, decoder_input_ids", config={"is_encoder_decoder": True}),
            "without a language head",
        ),
        (made("Hears", "input_features, input_ids"), None),
        (made("Plain"), None),
    ],
)
def test_a_model_that_no_sample_can_feed_is_refused(model: Any, said: str | None):
    if said is None:
        refuse_unread(model)
        return
    with pytest.raises(ModelError, match=said):
        refuse_unread(model)


def test_experts_that_are_layers_of_their_own_are_refused_by_their_name():
    model = made("Mixture")
    model.block = WithExperts()
    with pytest.raises(ModelError, match=r"layers of its own \(block\.experts\)"):
        refuse_unread(model)


def batch_of(answers: list[tuple[int, int]], length: int = 4) -> Batch:
    kinds = torch.full((len(answers), length), TEXT)
    kinds[1, 0] = PAD
    fields: Any = {"size": len(answers), "kinds": kinds, "answers": answers, "answering_kinds": kinds}
    return SimpleNamespace(**fields)  # type: ignore[return-value]


def test_rows_of_answers_are_at_the_positions_that_predict_them():
    logits = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    whole = at_answers(logits, batch_of([(2, 4), (3, 3)]))
    assert torch.equal(whole[0], logits[0, 1:3]) and whole[1].shape == (0, 3)
    kept = at_answers(logits[:, 1:], batch_of([(2, 4), (3, 4)]))  # of the last three positions alone
    assert torch.equal(kept[0], logits[0, 1:3]) and torch.equal(kept[1], logits[1, 2:3])


def test_rows_of_other_outputs_by_hand():
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    output = SimpleNamespace(logits=scores)
    batch = batch_of([(4, 4), (4, 4)])
    (first, second) = rows_of(made("XForSequenceClassification"), output, batch)
    assert first.tolist() == [[1.0, 2.0, 3.0]] and second.shape == (1, 3)
    (first, _) = rows_of(made("XForSequenceClassification", config=MULTI), output, batch)
    assert first.tolist() == [[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]  # a yes of each against a no of 0
    regression = made("XForSequenceClassification", config=REGRESSION)
    assert rows_of(regression, output, batch)[0].tolist() == [[1.0, 2.0, 3.0]]
    hidden = torch.arange(2 * 4 * 2.0).reshape(2, 4, 2)
    first, second = rows_of(made("XModel"), Named(hidden), batch)
    assert torch.equal(first, hidden[0]) and torch.equal(second, hidden[1, 1:])  # without its padding


class Named(dict):
    """An output of transformers: by name, or the first of what it holds."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__(last_hidden_state=hidden)
        self.hidden = hidden

    def __getitem__(self, key: Any) -> Any:
        return self.hidden if key == 0 else super().__getitem__(key)


def test_counts_are_the_rows_that_are_read():
    batch = batch_of([(2, 4), (3, 3)])
    assert ANSWERS.counts(batch) == [2, 0]
    assert TOKENS.counts(batch) == [4, 3]
    assert Readout("classes", 5).counts(batch) == [5, 5]


def test_sums_count_the_rows_whose_likeliest_choice_is_the_same():
    p = [torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 1.0]])]
    q = [torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0]])]
    (found,) = ANSWERS.sums(p, q)
    assert (found.tokens, found.top1_agree) == (3, 2) and found.kl > 0
    assert ANSWERS.sums(p, p)[0].kl == 0
    distance = Readout("x", 1, by_distance=True)
    (far,) = distance.sums([torch.tensor([[3.0, 4.0]])], [torch.tensor([[3.0, 5.0]])])
    assert far.kl == pytest.approx(1 / 25)
