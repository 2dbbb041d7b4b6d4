"""What is measured of fused experts: loops over tokens, full gradients, and damage that was planted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from qprobe.inputs.batch import ANSWER, PAD, TEXT, VISION, Batch
from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import attribute, walking
from qprobe.measure.experts.outputs import ExpertNorms, expert_rows
from qprobe.measure.experts.routing import times
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.kl import in_four_bit, read_out
from qprobe.measure.runner import observe_outputs
from qprobe.measure.subject import Subject, subject_of
from qprobe.measure.weights import weight_rows
from qprobe.records import FormatSpec, Sample, asked
from qprobe.runs.key import Measures
from tests import mixtures
from tests.reading import answered

MEASURES = Measures(True, True)
Case = tuple[Subject, Batch]


@pytest.fixture(scope="module")
def case(mixture: Callable[[str], Path]) -> Callable[..., Case]:
    """`case(name)`: a mixture in float32 and a batch of three samples of unlike lengths, made once."""
    made: dict[str, Case] = {}

    def make(name: str, change: Callable[[Any], None] | None = None) -> Case:
        if change is None and name in made:
            return made[name]
        reference = load_reference(str(mixture(name)), "cpu")
        reference.model.float()
        if change is not None:
            change(reference.model)
        texts = ("a red bag", "name the unit and the number", "which one is it")
        asked_for = [Sample(f"text-{i}", asked(text)) for i, text in enumerate(texts)]
        samples = answered(reference.model, reference.processor, asked_for, 4, 4)
        subject = subject_of(reference, FormatSpec())
        found = subject, subject.encode(tuple(samples))
        return found if change is not None else made.setdefault(name, found)

    return make


def experts_of(subject: Subject) -> list[str]:
    return [x.name for x in subject.inventory.layers if x.experts]


@pytest.mark.parametrize("name", mixtures.NAMES)
def test_products_one_by_one_compute_what_the_module_does(case: Callable[..., Case], name: str):
    subject, batch = case(name)
    own = {x: subject.modules[x] for x in experts_of(subject)}
    with torch.no_grad():
        wanted = read_out(subject.model, batch)
        with replaced_forwards(own, lambda n, product, x: times(product, x, own[n].weight)):
            got = read_out(subject.model, batch)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(wanted, got, strict=True))
    assert len(own) == (2 if name == "deepseek_v3" else 4)


def tokens_of_experts(name: str, module: Any, args: tuple[Tensor, ...]) -> list[tuple[int, int, Tensor]]:
    """(expert, token, what it reads), one by one."""
    if name == "llama4":
        rows = args[0].reshape(mixtures.EXPERTS, -1, args[0].shape[-1])
        return [(e, t, x) for e, part in enumerate(rows) for t, x in enumerate(part) if bool(x.any())]
    x, index = args[0].reshape(-1, args[0].shape[-1]), args[1]
    return [(int(e), t, x[t]) for t, chosen in enumerate(index) for e in chosen]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_activation_error_of_each_expert_equals_a_loop_over_its_tokens(case: Callable[..., Case], name: str):
    subject, batch = case(name)
    rows, _ = observe_outputs(subject, batch, MEASURES)
    layer = next(x for x in experts_of(subject) if x.endswith("gate_up_proj"))
    module = subject.modules[layer].module
    seen: list[tuple[Tensor, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        read_out(subject.model, batch)
    handle.remove()
    weight, difference = subject.dequantized.own(layer), subject.dequantized.difference(layer, torch.float32)
    sums: dict[tuple[str, int], list[float]] = {}
    width = batch.kinds.shape[1]
    for expert, token, x in tokens_of_experts(name, module, seen[0]):
        sample, place = divmod(token, width)
        if batch.kinds[sample, place] == PAD:
            continue
        turned = name in ("gpt_oss", "llama4")  # stored as (experts, in, out)
        w, d = (m[expert].T if turned else m[expert] for m in (weight, difference))
        y = w.double() @ x.double()
        if name == "gpt_oss":
            y = y + module.gate_up_proj_bias[expert].detach()
        noise = d.double() @ x.double()
        total = sums.setdefault((batch.samples[sample].id, expert), [0, 0.0, 0.0, 0.0])
        total[0] += 1
        total[1] += float(y.square().sum())
        total[2] += float(noise.square().sum())
        total[3] = max(total[3], float(noise.abs().max()))
    found = rows[rows["layer"] == layer].set_index(["sample", "expert"])
    assert set(found.index) == set(sums)
    for key, (tokens, signal, noise, peak) in sums.items():
        row = found.loc[key]
        assert (row["tokens"], row["activation_n"]) == (tokens, tokens * subject.layers[layer].out_features)
        assert row["activation_signal"] == pytest.approx(signal, rel=1e-4)
        assert row["activation_noise"] == pytest.approx(noise, rel=1e-4)
        assert row["activation_peak"] == pytest.approx(peak, rel=1e-4)
    assert rows["expert"].notna().equals(rows["layer"].isin(experts_of(subject)))


def routes(subject: Subject, batch: Batch, layer: str) -> set[tuple[int, int]]:
    """(expert, token) that the module of `layer` is handed when the model runs as it is."""
    seen: list[tuple[Tensor, ...]] = []
    handle = subject.modules[layer].module.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        read_out(subject.model, batch)
    handle.remove()
    return {(int(e), t) for t, chosen in enumerate(seen[0][1].reshape(-1, 2)) for e in chosen}


@pytest.mark.slow
def test_tokens_that_4_bit_routes_elsewhere_are_counted_for_the_expert_that_loses_them(
    case: Callable[..., Case],
):
    subject, batch = case("qwen3_moe")
    layer = "model.layers.1.mlp.experts.down_proj"
    before = routes(subject, batch, layer)
    with in_four_bit(subject.modules, subject.dequantized, subject.quantized):
        gone = before - routes(subject, batch, layer)
    kinds = batch.kinds.reshape(-1)
    wanted = Counter(
        (batch.samples[t // batch.kinds.shape[1]].id, e) for e, t in gone if int(kinds[t]) != PAD
    )
    assert wanted.total() > 0  # or this test would show nothing
    rows, _ = observe_outputs(subject, batch, MEASURES)
    rows = rows[rows["layer"] == layer].set_index(["sample", "expert"])
    found = rows["propagated_rerouted"]
    assert found[found > 0].to_dict() == dict(wanted)
    features = subject.layers[layer].out_features
    assert (rows["propagated_n"] // features + found == rows["tokens"]).all()


def test_an_output_that_4_bit_makes_nan_counts_as_non_finite_and_not_as_rerouted(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
):
    subject, batch = case("qwen3_moe")
    own, layer = (
        subject.dequantized.weight,
        "model.layers.1.mlp.experts.down_proj",
    )  # nothing routes behind it
    clean, _ = observe_outputs(subject, batch, MEASURES)

    def poisoned(name: str) -> Tensor:
        weight = own(name).clone()
        if name == layer:
            weight[PLANTED, 0, 0] = float("nan")
        return weight

    monkeypatch.setattr(subject.dequantized, "weight", poisoned)
    rows, _ = observe_outputs(subject, batch, MEASURES)
    of_layer = [x[x["layer"] == layer].set_index(["sample", "expert"]) for x in (clean, rows)]
    was, now = (x.xs(PLANTED, level="expert") for x in of_layer)
    assert (was["propagated_n"] > 0).any() and (now["propagated_n"] == 0).all()
    assert now["propagated_nonfinite"].equals(was["propagated_n"])
    assert now["propagated_rerouted"].equals(was["propagated_rerouted"])


def test_weight_error_of_a_fused_weight_is_that_of_its_experts(case: Callable[..., Case]):
    subject, _ = case("mixtral")
    rows = weight_rows(subject.dequantized).set_index(["layer", "expert"])
    layer = experts_of(subject)[0]
    own, error = subject.dequantized.own(layer), subject.dequantized.difference(layer, torch.float32)
    for expert in range(mixtures.EXPERTS):
        row = rows.loc[(layer, expert)]
        assert row["n"] == own[expert].numel()
        assert row["noise"] == pytest.approx(float(error[expert].double().square().sum()), rel=1e-5)
    assert len(rows.loc[[layer]]) == mixtures.EXPERTS


def all_experts(model: Any) -> None:
    """Every token goes to every expert, so that no route flips; a smaller head, a smaller KL."""
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = mixtures.EXPERTS
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_sensitivities_with_experts_sum_to_the_kl_where_no_route_flips(case: Callable[..., Case], name: str):
    subject, batch = case(name, all_experts)
    found = attribute(subject.path, batch, 2)
    total = sum(k.kl for k in found.kl)
    assert total > 0
    assert found.rows["kl_sum"].sum() == pytest.approx(total, rel=0.03)
    shares = found.rows.groupby("layer")["kl_sum"].sum()
    assert set(experts_of(subject)) <= set(shares.index)
    own = subject.quantized - set(experts_of(subject))
    with torch.no_grad(), in_four_bit(subject.modules, subject.dequantized, own):
        without = read_out(subject.model, batch)
    kl = sum(k.kl for k in subject.path.readout.sums(subject.path.logits(batch, 0.0), without))
    assert kl < total  # experts have a share of their own


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_slopes_of_experts_equal_full_weight_gradients(case: Callable[..., Case], name: str):
    subject, batch = case(name)
    path, alpha = subject.path, 0.5
    with walking(path):
        reference = path.logits(batch, 0.0)
        slopes = path.slopes(batch, reference, alpha)
    layers = {n: subject.modules[n] for n in subject.quantized}
    leaves = {
        n: subject.dequantized.between(n, alpha, torch.float32)
        .detach()
        .requires_grad_(n in experts_of(subject))
        for n in layers
    }
    with torch.enable_grad(), replaced_forwards(layers, lambda n, p, x: times(p, x, leaves[n])):
        path.readout.damage(reference, read_out(subject.model, batch)).sum().backward()
    for layer in experts_of(subject):
        gradient = leaves[layer].grad
        assert gradient is not None
        wanted = float((gradient * subject.dequantized.difference(layer, torch.float32)).sum())
        assert float(slopes[layer].sum()) == pytest.approx(wanted, rel=1e-3, abs=1e-6)


PLANTED = 2
LAYER = "model.layers.0.mlp.experts.down_proj"


def plant(model: Any) -> None:
    """An outlier channel in one expert: what it reads shrinks 256 times, its column grows as much."""
    experts = model.model.layers[0].mlp.experts
    channel, half = 5, experts.gate_up_proj.shape[1] // 2
    with torch.no_grad():
        experts.gate_up_proj[PLANTED, half + channel] /= 256  # up_proj's row
        experts.down_proj[PLANTED, :, channel] *= 256


@pytest.mark.slow
def test_outliers_planted_in_one_expert_of_one_layer_head_the_ranking(case: Callable[..., Case]):
    subject, batch = case("qwen3_moe", plant)
    rows, _ = observe_outputs(subject, batch, MEASURES)
    nmse = pooled(rows, ["layer"])
    assert nmse.idxmax() == LAYER and nmse[LAYER] > 5 * nmse.drop(LAYER).max()
    by_expert = pooled(rows[rows["layer"] == LAYER], ["expert"])
    assert by_expert.idxmax() == PLANTED and by_expert[PLANTED] > 20 * by_expert.drop(PLANTED).max()
    shares = attribute(subject.path, batch, 2).rows.groupby("layer")["kl_sum"].sum()
    assert shares.idxmax() == LAYER


def pooled(rows: pd.DataFrame, keys: list[str]) -> pd.Series:
    sums = rows.groupby(keys)[["activation_noise", "activation_signal"]].sum()
    return sums["activation_noise"] / sums["activation_signal"]


def test_rows_of_experts_by_hand() -> None:
    # Two samples of three tokens: padding, text, answer; vision, text, text.
    kinds = torch.tensor([[PAD, TEXT, ANSWER], [VISION, TEXT, TEXT]])
    rows = [  # expert, token, |y|, |D x|, max |D x|
        (0, 1, 2.0, 1.0, 0.5), (0, 2, 1.0, nan, nan), (1, 0, 9.0, 9.0, 9.0),
        (1, 4, inf, 1.0, nan), (1, 5, 3.0, 0.0, 0.0), (0, 3, nan, nan, nan),
    ]  # fmt: skip
    expert, token, y, noise, peak = (torch.tensor(x) for x in zip(*rows, strict=True))
    call = ExpertNorms(expert, token, 3, 4, y, noise, peak, None)
    found = expert_rows("l", call, ["a", "b"], kinds).set_index(["sample", "expert"])
    assert found.index.tolist() == [("a", 0), ("b", 0), ("b", 1)]  # of (a, 1) there is padding alone
    assert found["tokens"].tolist() == [2, 1, 2] and set(found["layer"]) == {"l"}
    assert found["activation_n"].tolist() == [4, 0, 4] and found["activation_nonfinite"].tolist() == [4, 4, 4]
    assert found["activation_signal"].tolist() == [4, 0, 9] and found["activation_noise"].tolist() == [
        1,
        0,
        0,
    ]
    assert found["activation_peak"].fillna(-1).tolist() == [0.5, -1, 0]  # not known, and no error at all
    assert found.loc[("a", 0), ["peak_token", "peak_kind"]].tolist() == [1, "text"]
    assert found.loc[("b", 1), ["peak_token", "peak_kind"]].tolist() == [2, "text"]
    assert found.filter(like="propagated").isna().all(axis=None)
    vision = expert_rows("l", call, ["a", "b"], None)
    assert set(vision["peak_kind"]) == {"vision"} and vision["tokens"].sum() == 6
