"""Adapters as they lie in their folder, and how much of one is in stored weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qprobe.checkpoint.adapters.effect import (
    HALF,
    AdaptedLayer,
    Arrived,
    _can_hold,
    _effect,
    arrived,
    effect_problems,
    effect_remarks,
)
from qprobe.checkpoint.adapters.lora import Adapter, Fit, Pair, read_adapter, refuse_without_effect
from qprobe.errors import RunError
from qprobe.records import FormatSpec

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)  # of a weight of (4, 3), rank 2
HALVES = {"base_model.model.x.up.lora_A.weight": A, "base_model.model.x.up.lora_B.weight": B}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


def written(folder: Path, tensors: Mapping[str, Tensor] = HALVES, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def test_a_pair_adds_its_product_times_the_scaling(tmp_path: Path):
    (pair,) = read_adapter(written(tmp_path)).layers.values()
    assert pair.shape == (4, 3) and pair.scaling == 3.0 and not pair.is_zero
    by_hand = [[3 * sum(float(B[i, r] * A[r, j]) for r in range(2)) for j in range(3)] for i in range(4)]
    assert pair.delta(torch.device("cpu")).tolist() == by_hand
    for zero in (
        replace(pair, a=A * 0), replace(pair, b=B * 0), replace(pair, scaling=0.0)
    ):  # fmt: skip
        assert zero.is_zero and not zero.delta(torch.device("cpu")).any()


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"up": 10}}, 5.0),
        ({"alpha_pattern": {"down": 10}}, 3.0),
        ({"r": 8, "rank_pattern": {"x.up": 2}}, 3.0),
    ],
)
def test_the_scaling_is_that_of_peft(config: dict[str, Any], scaling: float, tmp_path: Path):
    adapter = read_adapter(written(tmp_path, **config))
    assert list(adapter.layers) == ["x.up"] and adapter.layers["x.up"].scaling == scaling
    assert adapter.config["peft_type"] == "LORA" and adapter.folder == tmp_path


@pytest.mark.parametrize("begun", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_an_adapter_that_left_its_base_alone_is_read_however_it_began(begun: Any, tmp_path: Path):
    assert list(read_adapter(written(tmp_path, init_lora_weights=begun)).layers) == ["x.up"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "is 'IA3'; only LoRA can be read"),
        ({"peft_type": None}, "is None; only LoRA"),
        ({"use_dora": True}, "more than a product for each linear layer: DoRA"),
        ({"bias": "all"}, r"biases \(bias\)"),
        ({"modules_to_save": ["lm_head"], "bias": "lora_only"}, r"whole modules \(modules_to_save\), biases"),
        ({"target_parameters": ["w"]}, "stacked experts"),
        ({"alora_invocation_tokens": [1, 2]}, "some tokens alone"),
        ({"arrow_config": {"top_k": 3}, "use_bdlora": {"nblocks": 2}}, r"a choice .*, BD-LoRA\."),
        ({"kasa_config": {"beta": 1e-4}, "monteclora_config": {"n": 4}}, r"KaSA, MonteCLoRA\."),
        ({"use_qalora": True}, r": QA-LoRA\."),
        ({"r": 4}, r"has rank 2, but adapter_config\.json says 4"),
        ({"r": 0}, "says r 0, which is no number above 0"),
        ({"lora_alpha": "6"}, "says lora_alpha '6', which is no number"),
        ({"lora_alpha": -1}, "says lora_alpha -1, which is no number"),
        ({"init_lora_weights": "pissa_niter_4"}, r"began as pissa_niter_4 \(init_lora_weights\)"),
        ({"init_lora_weights": "OLoRA"}, "began as olora"),
        ({"megatron_config": {"a": 1}, "megatron_core": "mine"}, "names the Python module 'mine'"),
    ],
)
def test_what_is_more_than_pairs_of_linear_layers_is_refused_by_name(
    config: dict[str, Any], said: str, tmp_path: Path
):
    with pytest.raises(RunError, match=said):
        read_adapter(written(tmp_path, **config))


def test_what_megatron_s_own_module_configures_is_read(tmp_path: Path):
    for config in (
        {"megatron_core": "megatron.core", "megatron_config": {"a": 1}},
        {"megatron_core": "mine"},
    ):
        assert list(read_adapter(written(tmp_path, **config)).layers) == ["x.up"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"base_model.model.x.up.lora_A.weight": A}, r"holds x\.up without its other half"),
        (
            {**HALVES, "base_model.model.x.up.lora_magnitude": torch.ones(2, 3)},
            r"holds base_model\.model\.x\.up\.lora_magn",
        ),
        ({**HALVES, "base_model.model.y.lora_A.weight": torch.ones(2)}, r"holds base_model\.model\.y"),
        ({}, "holds nothing, where pairs"),
        ({**HALVES, "base_model.model.x.up.lora_B.weight": torch.ones(4, 3)}, "has rank 2 and 3, but"),
        ({**HALVES, "base_model.model.x.up.lora_A.weight": torch.ones(3, 3)}, "has rank 3 and 2, but"),
    ],
)
def test_tensors_that_are_no_pairs_are_refused_by_name(tensors: dict[str, Tensor], said: str, tmp_path: Path):
    with pytest.raises(RunError, match=said):
        read_adapter(written(tmp_path, tensors))


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_adapter_that_a_training_which_diverged_left_is_refused(half: str, number: float, tmp_path: Path):
    tensors = {key: tensor.clone() for key, tensor in HALVES.items()}
    tensors[f"base_model.model.x.up.{half}.weight"][0, 1] = number
    with pytest.raises(
        RunError, match=r"has NaN or infinity in 1 of 1 layer: x\.up, as where a training div"
    ):
        read_adapter(written(tmp_path, tensors))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("adapter_config.json", None, r"holds no adapter: there is no adapter_config\.json"),
        ("adapter_config.json", "{", r"adapter_config\.json is damaged"),
        ("adapter_config.json", "[]", "holds no JSON object"),
        ("adapter_model.safetensors", "short", r"adapter_model\.safetensors is damaged"),
        ("adapter_model.safetensors", None, r"adapter_model\.safetensors.*pickles are not read"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(name: str, text: str | None, said: str, tmp_path: Path):
    path = written(tmp_path) / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(RunError, match=said):
        read_adapter(tmp_path)


class Small(nn.Module):
    """up (4, 3) and down (3, 4); head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def adapter_on(*names: str, pair: Pair = Pair(A, B, 3.0)) -> Adapter:  # noqa: B008  frozen
    return Adapter(Path("adapter"), {}, dict.fromkeys(names, pair))


def test_each_layer_of_an_adapter_fits_or_says_why_not():
    adapter = adapter_on("up", "down", "head", "gone", "embedding")
    wanted = {
        "up": "fits", "down": "another shape", "head": "tied", "gone": "not in the model",
        "embedding": "not in the model",
    }  # fmt: skip
    assert adapter.fits(Small()) == wanted
    assert adapter_on("up", "head", pair=Pair(A, B * 0, 3.0)).fits(Small()) == {"up": "zero", "head": "tied"}


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        ({"up": "fits", "down": "not in the model"}, "1 of 2 layers .* effect on M: down are not in it"),
        ({"up": "another shape"}, r"1 of 1 layer .* up have another shape, not \[4, 3\]"),
        ({"up": "fits", "down": "tied"}, "is on down, which is tied to the embedding"),
        ({"up": "tied", "down": "tied"}, "is on up, down, which are tied"),
        ({"up": "zero", "down": "zero"}, r"zero in all of its 2 layers \(up, down\)"),
        ({"up": "zero", "down": "fits"}, None),
    ],
)
def test_an_adapter_that_would_take_no_effect_is_refused(fits: dict[str, Fit], said: str | None):
    adapter = adapter_on(*fits)
    if said is None:
        refuse_without_effect(adapter, fits, "M")
        return
    with pytest.raises(RunError, match=said):
        refuse_without_effect(adapter, fits, "M")


def test_what_arrived_is_the_share_along_what_was_added():
    before, added = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert arrived(before, before + added, added) == Arrived(5.0, 5.0)
    assert arrived(before, before + added, added).share == 1.0
    assert arrived(before, before, added) == Arrived(0.0, 5.0) and Arrived(0.0, 0.0).share == 0.0
    # of [[2, 0], [0, 1]] half, and what is across it does not count
    assert arrived(before, before + added / 2 + torch.tensor([[0.0, 9.0], [9.0, 0.0]]), added).share == 0.5
    assert Arrived(1.0, 4.0) + Arrived(2.0, 8.0) == Arrived(3.0, 12.0)


@pytest.mark.parametrize(
    ("share", "state"), [(1.0, "took effect"), (0.5, "took effect"), (0.25, "no effect")]
)
def test_half_of_what_is_added_is_an_effect(share: float, state: str):
    base, merged, pair = Small(), Small(), Pair(A, B, 0.25)
    merged.load_state_dict(base.state_dict())
    with torch.no_grad():
        base.up.weight.zero_()
        merged.up.weight.copy_(share * pair.delta(torch.device("cpu")))
    found = _effect("up", "fits", [pair], base, merged, FormatSpec(), None)
    assert (found.layer, found.state, found.arrived) == ("up", state, pytest.approx(share))
    assert _effect("gone", "not in the model", [pair], base, merged, FormatSpec(), None).arrived is None


@pytest.mark.parametrize(("step", "state"), [(2.0**-9, "rounded away"), (2.0**-7, "no effect")])
def test_only_what_rounding_takes_back_is_no_fault_of_a_checkpoint(step: float, state: str):
    """Between 1 and 2 bfloat16 has steps of 2^-7, so that 1 + 2^-9 is 1 again, and 1 + 2^-7 is not."""
    base, pair = Small().bfloat16(), Pair(torch.ones(1, 3), torch.ones(4, 1), step)
    with torch.no_grad():
        base.up.weight.fill_(1.0)
    found = _effect("up", "fits", [pair], base, base, FormatSpec(), None)
    assert (found.state, found.arrived) == (state, 0.0)


@pytest.mark.parametrize(("rows", "state"), [(3, "rounded away"), (1, "no effect")])
def test_codes_that_hold_nearly_what_nearest_ones_would_are_no_fault_of_a_checkpoint(rows: int, state: str):
    """In steps of 2, of 1, 2.9 and 1 nearest holds 0, 2 and 0, calibrated codes that in some rows."""
    base, merged = Small().bfloat16(), Small().bfloat16()
    pair = Pair(torch.tensor([[1.0, 2.9, 1.0]]), torch.ones(4, 1), 2.0**-8)
    with torch.no_grad():
        base.up.weight.fill_(1.0)
        merged.up.weight.fill_(1.0)
        merged.up.weight[:rows, 1] += 2.0**-7
    found = _effect("up", "fits", [pair], base, merged, FormatSpec(), None)
    could = 2.9 * 2 / (1 + 2.9**2 + 1)
    assert could > HALF > could * 3 / 4
    assert (found.state, found.arrived) == (state, pytest.approx(could * rows / 4, rel=1e-3))


def test_a_share_that_rounding_errors_could_make_is_held_by_none():
    # Errors of 1, and 0.1 added, in 4 weights: 2 / (0.2 * sqrt(4)) = 5 is what they may move the share by.
    before, added, across = torch.zeros(1, 4), torch.full((1, 4), 0.1), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert arrived(before, added + across, added).share == pytest.approx(1)
    assert not _can_hold(before, added + across, added) and _can_hold(before, added + across / 100, added)


def test_each_kind_of_lost_effect_is_told_in_one_sentence():
    states = (
        "took effect", "no effect", "no effect", "not in the model", "another shape", "tied", "zero",
        "rounded away",
    )  # fmt: skip
    found = [AdaptedLayer(f"l{i}", state) for i, state in enumerate(states)]
    assert list(effect_problems(found)) == [
        "2 of 8 layers of the adapter hold less than half of what it adds: l1, l2.",
        "1 of 8 layers of the adapter are not in the checkpoint: l3.",
        "1 of 8 layers of the adapter have another shape in the checkpoint: l4.",
        "1 of 8 layers of the adapter are tied to the embedding: l5.",
    ]
    assert list(effect_remarks(found)) == [
        "1 of 8 layers of the adapter hold less than half of what it adds, since it is smaller than the "
        "steps between the numbers that are stored, as in any merge into this form: l7."
    ]
    for harmless in (found[:1], found[-1:], []):
        assert list(effect_problems(harmless)) == []
    assert list(effect_remarks(found[:-1])) == []
    assert list(effect_problems(found[6:7])) == [
        "The adapter adds nothing: lora_B is zero in all of its layers."
    ]
