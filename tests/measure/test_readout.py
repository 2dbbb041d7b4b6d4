"""Damage of models that answer nothing: a classifier's own distributions, an encoder's own output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPProcessor,
    CLIPTextConfig,
    LlamaConfig,
)

import qprobe
from qprobe.calibration.damage import damage_of, reference_outputs
from qprobe.errors import QprobeError
from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import attribute, direction
from qprobe.measure.kl import OUTPUTS, in_four_bit, read_out, readout_of
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec, Sample, asked
from tests import sequences, tiny

BERT = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": tiny.PAD}


def bert(**more: Any) -> Callable[[], Any]:
    return lambda: BertConfig(**BERT, **more)


def llama() -> Any:
    config = LlamaConfig(**tiny.decoder(32, 32, 2))
    config.num_labels = 1
    return config


def clip() -> Any:
    tower = {k: v for k, v in BERT.items() if k != "pad_token_id"}
    return CLIPConfig(
        text_config={**tower, **tiny.IDS},
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        projection_dim=16,
    )


def text_tower() -> Any:
    return CLIPTextConfig(
        **{k: v for k, v in BERT.items() if k != "pad_token_id"}, **tiny.IDS, projection_dim=16
    )


def bart() -> Any:
    return BartConfig(**sequences.BART, decoder_start_token_id=tiny.END, num_labels=3)


def clip_processor() -> tuple[Any, ...]:
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return (CLIPProcessor(images, tiny.make_tokenizer(())),)


RECIPES = {
    "classes": ("BertForSequenceClassification", bert(num_labels=3), tiny.encoder_tokenizer),
    "labels": (
        "BertForSequenceClassification",
        bert(num_labels=3, problem_type="multi_label_classification"),
        tiny.encoder_tokenizer,
    ),
    "reward": ("LlamaForSequenceClassification", llama, tiny.text_tokenizer),
    "tokens": ("BertForTokenClassification", bert(num_labels=4), tiny.encoder_tokenizer),
    "masked": ("BertForMaskedLM", bert(), tiny.encoder_tokenizer),
    "encoder": ("BertModel", bert(), tiny.encoder_tokenizer),
    "clip": ("CLIPModel", clip, clip_processor),
    "pooled": ("CLIPTextModelWithProjection", text_tower, tiny.encoder_tokenizer),
    "sequences": ("BartForSequenceClassification", bart, lambda: (sequences.tokenizer_with("$A <|end|>"),)),
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """A model of RECIPES in float32, made once."""

    @cache
    def made(name: str) -> Subject:
        folder = tiny.write_recipe(tiny.Recipe(*RECIPES[name]), name, tmp_path_factory.mktemp(name))
        reference = load_reference(str(folder), "cpu")
        reference.model.float()
        return subject_of(reference, FormatSpec())

    return made


def samples(name: str) -> tuple[Sample, ...]:
    texts = ("a red bag", "name the unit of the dial, please", "which one")
    images = [tiny.picture(i) if name == "clip" else None for i in range(3)]
    return tuple(
        Sample(f"text-{i}", asked(text, x)) for i, (text, x) in enumerate(zip(texts, images, strict=True))
    )


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = sum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def sigmoid_kl(x: float, y: float) -> float:
    p, q = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(-y))
    return kl([p, 1 - p], [q, 1 - q])


def distance(x: list[float], y: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)


def rows_by_hand(name: str, output: Any) -> list[list[float]]:
    """The rows of one sample that ran alone, so that it has no padding."""
    if name == "clip":
        return [output.image_embeds[0].tolist(), output.text_embeds[0].tolist()]
    if name == "pooled":
        return output.text_embeds.tolist()
    if name == "encoder":
        return output.last_hidden_state[0].tolist()
    return output.logits.reshape(-1, output.logits.shape[-1]).tolist()


def damage_by_hand(name: str, x: list[list[float]], y: list[list[float]]) -> float:
    pairs = list(zip(x, y, strict=True))
    if name in ("clip", "encoder", "pooled"):
        return sum(distance(a, b) for a, b in pairs)
    if name in ("labels", "reward"):
        return sum(sigmoid_kl(c, d) for a, b in pairs for c, d in zip(a, b, strict=True))
    return sum(kl(softmax(a), softmax(b)) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_damage_is_that_of_each_sample_alone_by_the_formula(name: str, subject: Callable[[str], Subject]):
    model = subject(name)
    batch, readout = model.encode(samples(name)), readout_of(model.model)
    assert readout is not None
    everything = in_four_bit(model.modules, model.dequantized, model.quantized)
    with torch.no_grad():
        plain = read_out(model.model, batch)
        with everything:
            found = readout.sums(plain, read_out(model.model, batch))
    assert [x.tokens for x in found] == readout.counts(batch)
    for sums, sample in zip(found, samples(name), strict=True):
        alone = model.encode((sample,)).inputs
        with torch.no_grad():
            x = rows_by_hand(name, model.model(**alone))
            with in_four_bit(model.modules, model.dequantized, model.quantized):
                y = rows_by_hand(name, model.model(**alone))
        assert sums.kl == pytest.approx(damage_by_hand(name, x, y), rel=2e-3, abs=1e-6)
        assert sums.kl > 0


@pytest.mark.parametrize("name", RECIPES)
def test_sensitivities_add_up_to_the_damage(name: str, subject: Callable[[str], Subject]):
    model = subject(name)
    batch = model.encode(samples(name))
    found = attribute(model.path, batch, 4)
    total = sum(x.kl for x in found.kl)
    assert found.rows["kl_sum"].sum() == pytest.approx(total, rel=0.02)
    # nothing but the fixed ones and what the readout does not see, a pooler beside a hidden state
    assert set(found.rows["layer"]) >= {x for x in model.quantized if "pooler" not in x}


@pytest.mark.parametrize("name", ["classes", "encoder", "clip"])
def test_isolated_damage_is_half_the_curvature(name: str, subject: Callable[[str], Subject]):
    # Half the curvature is the damage of a small step over the square of the step; the estimates of many
    # seeds, here of one sample many times over, spread around it by sqrt(2 / 400) = 7 % or so.
    model, step = subject(name), 0.1
    one = model.encode(samples(name)[:1])
    many = one.repeated(400)
    many = replace(many, samples=tuple(replace(s, answer=f"{i}") for i, s in enumerate(many.samples)))
    means = {layer: float(x.mean()) for layer, x in model.path.isolated_kl(many).items()}
    assert set(means) >= {x for x in model.quantized if "pooler" not in x}
    for layer in sorted(means, key=lambda x: means[x])[-3:]:
        path = replace(model.path, modules={layer: model.modules[layer]})
        damage = path.readout.damage(path.logits(one, 0.0), path.logits(one, step))
        assert means[layer] == pytest.approx(float(damage) / step**2, rel=0.3)


@pytest.mark.parametrize("name", ["classes", "encoder", "clip"])
def test_calibration_is_held_to_the_damage_of_each_sample_alone(name: str, subject: Callable[[str], Subject]):
    model = subject(name)
    totals, rows = [], []
    for group in (samples(name), *((s,) for s in samples(name))):
        batch = model.encode(group)
        wanted = reference_outputs(model, batch)
        with torch.no_grad(), in_four_bit(model.modules, model.dequantized, model.quantized):
            damage, count = damage_of(model, batch, wanted)
        totals.append(float(damage))
        rows.append(count)
    assert totals[0] == pytest.approx(sum(totals[1:]), rel=2e-3) and rows[0] == sum(rows[1:])


def test_a_random_direction_of_an_output_has_the_curvature_of_its_damage():
    # |h_hat - h|^2 / |h|^2 has the Hessian 2 / |h|^2 times the identity
    h = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = direction(OUTPUTS, h, "f" * 16)
    assert torch.allclose(found.square(), torch.tensor([[2 / 25] * 2, [2 / 4] * 2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_scan_measures_all_that_there_is(name: str, tmp_path: Path, request: pytest.FixtureRequest):
    if name not in ("classes", "encoder"):  # one of each kind of damage is drawn
        request.getfixturevalue("no_pictures")
    folder = tiny.write_recipe(tiny.Recipe(*RECIPES[name]), name, tmp_path / "model")
    texts = ("a red bag", "name the unit of the dial", "which one")
    rows: list[dict[str, str]] = [{"prompt": text} for text in texts]
    if name == "clip":
        for i, row in enumerate(rows):
            (tmp_path / f"{i}.png").write_bytes(tiny.picture(i))
            row["image"] = str(tmp_path / f"{i}.png")
    run = qprobe.scan(str(folder), data=rows, out=tmp_path / "run", device="cpu")
    used = run.layers[run.layers["activation_nmse"].notna()]
    assert len(used) > 5 and used["propagated_nmse"].notna().all()
    assert used["sensitivity_kl"].notna().sum() > 5 and used["isolated_kl"].notna().sum() > 5


def test_a_text_without_an_image_is_refused_by_a_model_of_pairs(tmp_path: Path):
    folder = tiny.write_recipe(tiny.Recipe(*RECIPES["clip"]), "clip", tmp_path / "model")
    with pytest.raises(QprobeError, match="it has no image, and a CLIPModel reads each text with one"):
        qprobe.scan(str(folder), data=[{"prompt": "a red bag"}], out=tmp_path / "run", device="cpu")


def test_a_reward_model_whose_config_names_no_padding_scores_a_batch_as_it_does_one(tmp_path: Path):
    def unpadded() -> Any:
        config = llama()
        config.pad_token_id = None
        return config

    recipe = tiny.Recipe("LlamaForSequenceClassification", unpadded, tiny.text_tokenizer)
    folder = tiny.write_recipe(recipe, "reward", tmp_path)
    model = subject_of(load_reference(str(folder), "cpu"), FormatSpec())
    model.model.float()
    with torch.no_grad():
        together = read_out(model.model, model.encode(samples("reward")))
        for row, sample in zip(together, samples("reward"), strict=True):
            (alone,) = read_out(model.model, model.encode((sample,)))
            torch.testing.assert_close(row, alone, rtol=1e-3, atol=1e-4)


def test_what_is_no_known_output_has_no_readout(tmp_path: Path):
    recipe = tiny.Recipe("BertForMultipleChoice", bert(), tiny.encoder_tokenizer)
    tiny.write_recipe(recipe, "choice", tmp_path)
    assert readout_of(load_reference(str(tmp_path), "cpu").model) is None
