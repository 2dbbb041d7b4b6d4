"""Weight, activation and propagated error against oracles that run modules one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import DebertaV2Config

from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import walking
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.kl import KlSums
from qprobe.measure.outputs import _noise, split_by_sample
from qprobe.measure.runner import halves_are_independent, kl_rows, observe, observe_outputs, shared_layers
from qprobe.measure.subject import Subject, subject_of
from qprobe.measure.weights import error_sums, weight_rows
from qprobe.records import FormatSpec, Sample, asked
from qprobe.runs.key import Measures
from tests import reference, tiny
from tests.measure.conftest import ALL, Case

CaseOf = Callable[[str], Case]
MEASURES = Measures(propagated=True, sensitivity=False)


def rows_of(case: Case, count: int = 3) -> pd.DataFrame:
    frames = [
        observe_outputs(case.subject, case.subject.encode(group), MEASURES)[0]
        for group in case.subject.groups(case.samples[:count], 4)
    ]
    return pd.concat(frames)


@pytest.mark.parametrize("name", ALL)
def test_weight_error_equals_an_independent_round_trip(case: CaseOf, name: str) -> None:
    subject = case(name).subject
    rows = weight_rows(subject.dequantized).set_index("layer")
    assert set(rows.index) == set(subject.modules)
    for layer, module in subject.modules.items():
        error = reference.round_trip(module.weight).double() - module.weight.double()
        expected = float(error.square().sum() / module.weight.double().square().sum())
        assert rows.noise[layer] / rows.signal[layer] == pytest.approx(expected, rel=1e-6)
        assert rows.peak[layer] == pytest.approx(float(error.abs().max()), rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_activation_and_propagated_error_equal_the_oracle(case: CaseOf, name: str) -> None:
    found = case(name)
    sample = found.samples[:1]
    batch = found.subject.encode(sample)
    rows = rows_of(found, 1).set_index("layer")
    activation = reference.activation_sums(found.subject.model, batch.inputs)
    propagated = reference.propagated_sums(found.subject.model, found.subject.quantized, batch.inputs)
    assert list(rows.index) == list(activation)  # execution order, and every linear that ran
    for layer, (signal, noise, peak) in activation.items():
        row = rows.loc[layer]
        assert row.activation_signal == pytest.approx(signal, rel=1e-4)
        assert row.activation_noise == pytest.approx(noise, rel=1e-4)
        assert row.activation_peak == pytest.approx(peak, rel=1e-4)
        assert row.propagated_noise == pytest.approx(propagated[layer][1], rel=1e-3)


@pytest.mark.parametrize("name", ["mllama", "qwen2_vl", "llama"])
def test_a_batch_gives_each_sample_what_it_gives_alone(case: CaseOf, name: str) -> None:
    found = case(name)
    keys = ["sample", "layer"]
    together = rows_of(found).set_index(keys).sort_index()
    alone = pd.concat(
        observe_outputs(found.subject, found.subject.encode((s,)), MEASURES)[0] for s in found.samples
    )
    alone = alone.set_index(keys).sort_index()
    assert (together.tokens == alone.tokens).all()
    for column in ("activation_signal", "activation_noise", "propagated_noise", "activation_peak"):
        pd.testing.assert_series_equal(together[column], alone[column], rtol=1e-3)
    assert (together.peak_token == alone.peak_token).mean() > 0.99


def test_peaks_say_whether_the_token_is_of_the_image_the_prompt_or_the_answer(case: CaseOf) -> None:
    rows = rows_of(case("mllama"))
    is_vision = rows.layer.str.contains(r"vision_model|projector|cross_attn\.[kv]_proj")
    assert (rows[is_vision].peak_kind == "vision").all()
    # The prompt's only image token is one of the text sequence; most peaks lie elsewhere.
    assert set(rows[~is_vision].peak_kind) <= {"vision", "text", "answer"}
    assert {"text", "answer"} <= set(rows[~is_vision].peak_kind)


@pytest.mark.parametrize("name", ALL)
def test_samples_of_a_batch_do_not_see_each_other(case: CaseOf, name: str) -> None:
    found = case(name)
    subject = found.subject
    batch = subject.encode(found.samples[:1])
    assert halves_are_independent(subject, batch)


def test_a_model_whose_samples_see_each_other_is_noticed(case: CaseOf) -> None:
    found = case("llama")
    subject = found.subject
    first = subject.model.model.layers[0]

    def leak(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output + output.mean(dim=0, keepdim=True)

    handle = first.register_forward_hook(leak)
    try:
        batch = subject.encode(found.samples[:1])
        assert not halves_are_independent(subject, batch)
    finally:
        handle.remove()


@pytest.fixture
def deberta(tmp_path: Path) -> Subject:
    """DeBERTa, which projects one table of 128 relative positions for all samples."""
    config = DebertaV2Config(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    recipe = tiny.Recipe("DebertaV2Model", lambda: config, tiny.encoder_tokenizer)
    found = load_reference(str(tiny.write_recipe(recipe, "deberta", tmp_path / "model")), "cpu")
    found.model.float()
    return subject_of(found, FormatSpec())


def test_a_layer_whose_rows_are_not_those_of_samples_is_noticed(deberta: Subject) -> None:
    assert not halves_are_independent(deberta, deberta.encode((Sample("a", asked("a red bag")),)))


def test_shared_rows_are_no_samples_rows_although_their_number_divides(deberta: Subject) -> None:
    samples = tuple(Sample(f"{i}", asked("a red bag")) for i in range(2))  # 128 rows divide by 2
    frames = observe(deberta, replace(MEASURES, propagated=False, sensitivity=True), deberta.encode(samples))
    rows = frames["outputs"].set_index("layer")
    tables = {name for name in rows.index if ".pos_" in name}
    assert len(tables) == 2 and rows.loc[rows["tokens"].isna()].index.unique().tolist() == sorted(tables)
    measured = set(frames["sensitivity"].dropna()["layer"])
    assert measured == set(rows.index) - tables


@pytest.mark.slow
def test_shared_rows_of_a_vision_tower_are_known_although_the_first_batch_has_no_image(
    tiny_folder: Callable[[str], Path],
) -> None:
    found = load_reference(str(tiny_folder("qwen2_vl")), "cpu")
    tower: Any = found.model.float().model.visual
    layer: Any = tower.blocks[0].mlp.fc1

    def read_a_table(*_: object) -> None:  # of 8 rows, whatever the batch
        layer(torch.ones(8, layer.in_features))

    tower.register_forward_pre_hook(read_a_table)
    subject = subject_of(found, FormatSpec())
    texts, pictures = (
        subject.encode(tuple(Sample(x, asked("what is it?", image), "a bag") for x in ("a", "b")))
        for image in (None, tiny.picture(0))
    )
    assert shared_layers(subject, texts) == frozenset()
    rows = observe_outputs(subject, pictures, replace(MEASURES, propagated=False))[0].set_index("layer")
    assert set(rows.index[rows["tokens"].isna()]) == {"model.visual.blocks.0.mlp.fc1"}
    assert shared_layers(subject, texts) == frozenset()


def test_nonfinite_pairs_are_counted_and_not_summed() -> None:
    # pairs (1, 2), (2, 2), (nan, 1), (1, inf): two are finite; signal 1 + 4, noise 1 + 0
    wanted = torch.tensor([1.0, 2.0, float("nan"), 1.0])
    got = torch.tensor([2.0, 2.0, 1.0, float("inf")])
    sums, peak = error_sums(wanted, got)
    assert (sums.n, sums.signal, sums.noise, sums.nonfinite, peak) == (2, 5.0, 1.0, 2, 1.0)


def test_a_token_with_a_nonfinite_activation_is_left_out_with_a_count(case: CaseOf) -> None:
    found = case("llama")
    embedding = found.subject.model.get_input_embeddings()
    batch = found.subject.encode(found.samples[:1])
    poisoned = int(batch.inputs["input_ids"][0, -1])  # the last token: causal attention keeps it to itself
    others = int((batch.inputs["input_ids"][0] == poisoned).sum())
    clean = observe_outputs(found.subject, batch, MEASURES)[0].set_index("layer")
    before = embedding.weight.data[poisoned].clone()
    try:
        embedding.weight.data[poisoned, 0] = float("nan")
        rows = observe_outputs(found.subject, batch, MEASURES)[0].set_index("layer")
    finally:
        embedding.weight.data[poisoned] = before
    name = "model.layers.0.self_attn.q_proj"
    features = found.subject.layers[name].out_features
    assert others == 1
    assert rows.activation_nonfinite[name] == others * features
    assert rows.activation_n[name] == clean.activation_n[name] - others * features
    assert 0 < rows.activation_noise[name] < clean.activation_noise[name]


def test_forwards_are_restored_after_an_exception(case: CaseOf) -> None:
    modules = case("llama").subject.modules
    with pytest.raises(RuntimeError, match="inside"), replaced_forwards(modules, lambda n, m, x: x):
        raise RuntimeError("inside")
    assert all("forward" not in m.__dict__ for m in modules.values())


def test_rows_that_no_sample_count_divides_are_not_split() -> None:
    assert split_by_sample(torch.zeros(5, 3), 2) is None
    parts = split_by_sample(torch.arange(12.0).reshape(2, 2, 3), 2)
    assert parts is not None and parts.shape == (2, 2, 3)


def test_a_layer_whose_rows_belong_to_no_sample_has_a_row_of_nulls_in_its_place(case: CaseOf) -> None:
    found, name = case("llama"), "model.layers.0.mlp.up_proj"
    subject, batch = found.subject, found.subject.encode(found.samples[:2])
    up = subject.modules[name]
    clean = observe_outputs(subject, batch, MEASURES)[0]

    # Besides what it reads, it is run on three rows, which two samples (and twice two) cannot share.
    def three_rows(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        module.forward(args[0].reshape(-1, args[0].shape[-1])[:3])

    handle = up.register_forward_pre_hook(three_rows)
    try:
        rows = observe_outputs(subject, batch, MEASURES)[0]
    finally:
        handle.remove()
    assert rows["layer"].tolist() == clean["layer"].tolist()
    of_up = rows["layer"] == name
    assert rows.loc[of_up, "sample"].tolist() == [s.id for s in batch.samples]
    assert rows.loc[of_up].drop(columns=["sample", "layer"]).isna().all(axis=None)
    others = [x[x["layer"] != name].reset_index(drop=True) for x in (rows, clean)]
    pd.testing.assert_frame_equal(*others, check_dtype=False)  # counts beside nulls come as floats


def test_a_batch_with_fewer_sums_than_samples_is_no_batch_of_them(case: CaseOf) -> None:
    found = case("llama")
    batch = found.subject.encode(found.samples[:2])
    assert kl_rows(batch, "x", [KlSums(1.0, 2, 1), KlSums(0.0, 0, 0)])["sample"].tolist() == ["text-0"]
    with pytest.raises(ValueError, match="shorter"):
        kl_rows(batch, "x", [KlSums(1.0, 2, 1)])


@pytest.mark.slow
def test_inputs_are_those_of_the_loaded_model_while_the_path_is_walked(tiny_folder) -> None:
    subject = subject_of(load_reference(str(tiny_folder("mllama")), "cpu"), FormatSpec())
    samples = tuple(tiny.questions("mllama", 2))
    outside = subject.encode(samples).inputs["pixel_values"]
    with walking(subject.path):
        assert subject.model.dtype == torch.float32
        inside = subject.encode(samples).inputs["pixel_values"]
    assert inside.dtype == outside.dtype == torch.bfloat16 and torch.equal(inside, outside)


def test_what_4_bit_adds_to_an_output_is_computed_in_float32_on_a_cpu() -> None:
    torch.manual_seed(0)
    own, hat, x = (torch.randn(shape).bfloat16() for shape in ((8, 64), (8, 64), (2, 3, 64)))
    wanted = x.double() @ (hat.double() - own.double()).T
    found = _noise(own, hat, x)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert _noise(own.to("meta"), hat.to("meta"), x.to("meta")).dtype == torch.bfloat16  # as on a GPU
