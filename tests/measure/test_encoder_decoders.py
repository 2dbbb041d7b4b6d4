"""Encoder-decoders against oracles that give `labels` to transformers, whose shift is its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from qprobe.calibration.gram import gathered, shared_inputs
from qprobe.inputs.answers import Batching, answered
from qprobe.inputs.batch import PAD
from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import walking
from qprobe.measure.runner import candidate_kl, halves_are_independent, observe_outputs
from qprobe.measure.subject import subject_of
from qprobe.records import FormatSpec, Sample, asked
from qprobe.runs.key import Measures
from tests import reference, sequences, tiny
from tests.measure.conftest import Case
from tests.tiny import BOS, END

NAMES = ("t5", "bart", "florence2")
TEXTS = (
    ("which one is larger, the left bar or the right bar?", "the left bar is larger"),
    ("name the unit", "seven"),
    ("what does the image show?", "a row of teeth and an arrow"),
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Factory of cases by name, in float32, each made once."""
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            tiny.write_recipe(sequences.RECIPES[name], name, folder)
            found = load_reference(str(folder), "cpu")
            found.model.float()
            samples = [
                Sample(f"{i}", asked(prompt, tiny.picture(i) if name == "florence2" else None), answer)
                for i, (prompt, answer) in enumerate(TEXTS)
            ]
            made[name] = Case(subject_of(found, FormatSpec()), tuple(samples))
        return made[name]

    return make


CaseOf = Callable[[str], Case]


def prompt_of(subject: Any, sample: Sample) -> dict[str, Tensor]:
    """What the encoder reads of one sample, by the processor alone."""
    processor = subject.reference.processor
    if not sample.images:
        return dict(processor([sample.prompt], return_tensors="pt"))
    from qprobe.data.images import decode

    return dict(processor(images=decode(sample.images[0]).image, text=sample.prompt, return_tensors="pt"))


def labels_of(subject: Any, name: str, sample: Sample) -> list[int]:
    """The answer between what stands around it, and where it begins."""
    processor = subject.reference.processor
    tokenizer = getattr(processor, "tokenizer", processor)
    own = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    return [*([] if name == "t5" else [BOS]), *own, END]


def rows_of(model: Any, subject: Any, name: str, sample: Sample) -> Tensor:
    """The logits of the answer's tokens and its end."""
    labels = labels_of(subject, name, sample)
    with torch.no_grad():
        logits = model(**prompt_of(subject, sample), labels=torch.tensor([labels])).logits[0]
    return logits if name == "t5" else logits[1:]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_kl_equals_that_of_logits_which_transformers_makes_of_labels(case: CaseOf, name: str):
    subject, samples = case(name)
    batch = subject.encode(samples)
    assert batch.decoder_kinds is not None
    assert bool((batch.decoder_kinds == PAD).any()) and bool((batch.kinds == PAD).any())
    found = candidate_kl(subject, batch, {"all": frozenset()})["all"].set_index("sample")
    twin = reference.quantized_copy(subject.model, subject.quantized)
    for sample in samples:
        wanted, got = (rows_of(x, subject, name, sample) for x in (subject.model, twin))
        assert found.answer_tokens[sample.id] == len(wanted)
        assert found.kl_sum[sample.id] == pytest.approx(reference.kl_nats(wanted, got), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_equal_a_loop_that_takes_the_likeliest_token(case: CaseOf, name: str):
    subject, samples = case(name)
    own = answered(subject.model, subject.processed, samples, Batching(3, 4))
    tokenizer = getattr(subject.reference.processor, "tokenizer", subject.reference.processor)
    start = subject.model.config.get_text_config().decoder_start_token_id
    for sample, found in zip(samples, own, strict=True):
        ids = [start]
        for _ in range(4):
            with torch.no_grad():
                given = torch.tensor([ids])
                logits = subject.model(**prompt_of(subject, sample), decoder_input_ids=given).logits
            ids.append(int(logits[0, -1].argmax()))
        said = ids[1 : ids.index(END, 1)] if END in ids[1:] else ids[1:]
        assert found.answer == tokenizer.decode(said)
        assert found.ends == (END in ids[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_errors_of_every_layer_equal_those_of_samples_run_alone(case: CaseOf, name: str):
    # Layers of the decoder read its tokens, but for keys and values of cross-attention.
    subject, samples = case(name)
    batch = subject.encode(samples)
    assert halves_are_independent(subject, batch)
    rows = observe_outputs(subject, batch, Measures(propagated=True, sensitivity=False))[0]
    rows = rows.set_index(["sample", "layer"])
    for sample in samples:
        labels = labels_of(subject, name, sample)
        start = subject.model.config.get_text_config().decoder_start_token_id
        given = {**prompt_of(subject, sample), "decoder_input_ids": torch.tensor([[start, *labels[:-1]]])}
        activation = reference.activation_sums(subject.model, given)
        propagated = reference.propagated_sums(subject.model, subject.quantized, given)
        assert set(activation) == set(subject.modules)
        for layer, (signal, noise, peak) in activation.items():
            row = rows.loc[(sample.id, layer)]
            assert row.activation_signal == pytest.approx(signal, rel=1e-3), layer
            assert row.activation_noise == pytest.approx(noise, rel=1e-3), layer
            assert row.activation_peak == pytest.approx(peak, rel=1e-3), layer
            assert row.propagated_noise == pytest.approx(propagated[layer][1], rel=5e-3), layer


@pytest.mark.slow
def test_peaks_of_the_decoder_are_of_the_answer_and_those_of_the_encoder_are_not(case: CaseOf):
    subject, samples = case("florence2")
    rows = observe_outputs(subject, subject.encode(samples), Measures(False, False))[0]
    kinds = {
        where: set(rows[rows.layer.str.contains(pattern)].peak_kind)
        for where, pattern in (
            ("encoder", r"language_model\.encoder\.|encoder_attn\.[kv]_proj"),
            ("decoder", r"decoder\.layers\..*(?:self_attn|fc\d|encoder_attn\.(?:q_proj|out_proj))|lm_head"),
            ("vision", "vision_tower"),
        )
    }
    assert kinds["decoder"] == {"answer"} and kinds["vision"] == {"vision"}
    assert kinds["encoder"] == {"vision", "text"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sensitivities_equal_full_weight_gradients(case: CaseOf, name: str):
    subject, samples = case(name)
    batch = subject.encode(samples[:1])
    with walking(subject.path):
        plain = subject.path.logits(batch, 0.0)
        slopes = subject.path.slopes(batch, plain, 0.5)
    expected = reference.weight_gradient_slopes(
        subject.model, subject.quantized, batch.inputs, batch.answers[0], 0.5
    )
    scale = max(abs(v) for v in expected.values())
    for layer, value in expected.items():
        assert float(slopes[layer][0]) == pytest.approx(value, abs=1e-3 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "florence2"])
def test_gram_matrices_hold_the_tokens_of_encoder_and_decoder_without_padding(case: CaseOf, name: str):
    subject, samples = case(name)
    batch = subject.encode(samples)
    inputs = shared_inputs(subject, [batch])
    found = gathered(subject, inputs, [batch])
    wanted: dict[str, Tensor] = {}
    for sample in samples:
        labels = torch.tensor([labels_of(subject, name, sample)])
        start = torch.tensor([[subject.model.config.get_text_config().decoder_start_token_id]])
        read = torch.cat([start, labels[:, :-1]], dim=1)
        given = {**prompt_of(subject, sample), "decoder_input_ids": read}
        for layer, (x, _) in reference.captured(subject.model, given).items():
            wanted[layer] = wanted.get(layer, torch.zeros(1)) + x.double().T @ x.double()
    leaders = {layer: one.leader for one in inputs for layer in one.names}
    assert set(leaders) == set(subject.quantized)
    for layer, leader in leaders.items():
        gram = found.grams[leader].total
        torch.testing.assert_close(gram.double(), wanted[layer], rtol=1e-3, atol=1e-3 * gram.abs().max())


def test_columns_of_a_table_hold_tokens_of_both_sequences(case: CaseOf):
    subject, samples = case("bart")
    rows = observe_outputs(subject, subject.encode(samples), Measures(False, False))[0]
    tokens = rows.pivot_table(index="layer", columns="sample", values="tokens", aggfunc="sum")
    prompt, answer = tokens.loc["model.encoder.layers.0.fc1"], tokens.loc["model.decoder.layers.0.fc1"]
    for sample in samples:
        assert prompt[sample.id] == prompt_of(subject, sample)["input_ids"].shape[1]
        assert answer[sample.id] == len(labels_of(subject, "bart", sample))
    pd.testing.assert_series_equal(
        tokens.loc["model.decoder.layers.0.encoder_attn.k_proj"], prompt, check_names=False
    )


def test_a_folder_of_bart_says_its_beams_and_is_asked_for_greedy_answers(tmp_path: Path):
    folder = tiny.write_recipe(sequences.RECIPES["bart"], "bart", tmp_path / "model")
    found = load_reference(str(folder), "cpu")
    before = [s.answer for s in _answered(found, 4)]
    found.model.generation_config.update(num_beams=4, early_stopping=True, forced_eos_token_id=END)
    after = _answered(found, 4)
    # its beams are not asked for, and the end that generation puts behind the last token is not the model's
    assert [s.ends for s in after] == [False] * len(after)
    assert all(b is not None and b.startswith(a.answer or "") for a, b in zip(after, before, strict=True))


def _answered(found: Any, limit: int) -> list[Sample]:
    from qprobe.inputs.decoder import layout_of
    from qprobe.inputs.processed import ProcessedSamples

    asking = [Sample(str(i), asked(text)) for i, (text, _) in enumerate(TEXTS)]
    processed = ProcessedSamples(found.processor, found.model.dtype, layout_of(found.model))
    return answered(found.model, processed, asking, Batching(3, limit))
