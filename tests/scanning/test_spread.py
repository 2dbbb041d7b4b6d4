"""Models that accelerate laid out over devices: its hooks are obeyed, and the numbers are the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module

from qprobe.errors import MachineError, QprobeError
from qprobe.loading import reference
from qprobe.loading.reference import reference_of
from qprobe.loading.spread import GIB, device_of, devices_for
from qprobe.measure.attribution import on_host
from qprobe.measure.hooks import replaced_forwards
from qprobe.system.devices import BEST, AskedDevice, parse_device
from qprobe.system.processes import Shard
from tests.scanning.asked import Scanned, TinyFolder, options, scan

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class _Shift(ModelHook):
    """Stands in for accelerate's hook that moves inputs: here by one."""

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return (args[0] + 1, *args[1:]), kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        return output * 10


def test_a_replaced_forward_asks_the_hook_of_its_module() -> None:
    module = torch.nn.Linear(1, 1)
    add_hook_to_module(module, _Shift())
    hooked = module.forward
    with replaced_forwards({"a": module}, lambda _name, _module, x: x):
        assert module(torch.tensor([2.0])).item() == 30.0  # (2 + 1) x 10
    assert module.forward is hooked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllama", "qwen2_vl", "llama"])
def test_a_dispatched_model_gives_the_same_table(
    tiny_folder: TinyFolder, scanned: Scanned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        loaded = reference_of(*args, **kwargs)
        dispatch_model(loaded.model, {"": "cpu"}, force_hooks=True)
        return loaded

    monkeypatch.setattr("qprobe.scanning.opening.reference_of", dispatched)
    found = scan(**options(tiny_folder(name), tmp_path / "run"))
    table, expected = (pd.read_csv(run / "layers.csv") for run in (found.run, scanned(name).run))
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


def test_values_of_every_device_are_copied_in_their_order() -> None:
    values = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    assert {name: value.tolist() for name, value in on_host(values).items()} == {"a": [1, 2], "b": [3, 4]}
    assert all(value.dtype == torch.float64 for value in on_host(values).values())
    assert on_host({}) == {}


def test_a_limit_and_all_gpus_exclude_each_other(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    asked = options(tiny_folder("llama"), tmp_path / "run", device="auto", max_memory="8GiB")
    with pytest.raises(QprobeError, match="--max-memory keeps a scan to one GPU"):
        scan(**asked)


def test_several_processes_of_a_machine_do_not_each_take_all_gpus() -> None:
    with pytest.raises(MachineError, match="--device auto takes all GPUs"):
        device_of(Shard(0, 2, 0), parse_device("auto"))
    asked = parse_device("auto")
    assert device_of(Shard(0, 2), asked) == asked  # of a scheduler that gives each process GPUs of its own


@pytest.mark.parametrize(
    ("local", "local_world", "cards"),
    [(0, 2, (0, 1)), (1, 2, (2, 3)), (0, 1, (0, 1, 2, 3)), (3, 4, None), (1, 3, None)],
)
def test_processes_that_are_fewer_than_the_gpus_spread_over_their_own(
    local: int, local_world: int, cards: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    shard = Shard(local, local_world, local, local_world)
    if cards is None:  # a GPU each: that of its number
        assert devices_for(shard, BEST) == parse_device(f"cuda:{local}")
        with pytest.raises(MachineError, match="so few that each has two GPUs"):
            devices_for(shard, parse_device("auto"))
        return
    for asked in (BEST, parse_device("auto")):
        found = devices_for(shard, asked)
        assert (found.kind, found.cards, str(found.one)) == (asked.kind, cards, f"cuda:{cards[0]}")
    assert str(devices_for(shard, parse_device("cuda"))) == f"cuda:{local}"
    assert devices_for(shard, parse_device("cuda:1")) == parse_device("cuda:1")


@pytest.mark.parametrize(("kind", "size", "spread"), [(None, 4, False), (None, 40, True), ("auto", 4, True)])
def test_a_model_is_laid_over_the_cards_of_its_process_alone(
    kind: Any, size: int, spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qprobe.loading.reference.needed_bytes", lambda _: size * GIB)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda card: {2: (30 * GIB, 0), 3: (20 * GIB, 0)}[card])
    skeleton: Any = SimpleNamespace(model=None)
    asked = AskedDevice(kind, cards=(2, 3))
    layout = reference._layout(skeleton, asked, torch.device("cuda:2"))
    # Of what is free 2 GiB are left; 32 of 41 parts are 16-bit weights, the others 4-bit forms.
    over = {"device_map": "auto", "max_memory": {2: 28 * GIB * 32 // 41, 3: 18 * GIB * 32 // 41}}
    assert layout == (over if spread else {"device_map": {"": torch.device("cuda:2")}})


@TWO_GPUS
@pytest.mark.parametrize("name", ["mllama", "qwen2_vl"])
def test_a_model_over_two_gpus_gives_the_table_of_one(
    tiny_folder: TinyFolder, tmp_path: Path, name: str
) -> None:
    one, two = (
        scan(**options(tiny_folder(name), tmp_path / device[-1], device=device))
        for device in ("cuda:0", "auto")
    )
    table, expected = (pd.read_csv(run.run / "layers.csv") for run in (two, one))
    exact = ["layer", "weight_nmse", "activation_nmse", "propagated_nmse", "samples", "tokens"]
    pd.testing.assert_frame_equal(table[exact], expected[exact], check_exact=True)
    columns = ["sensitivity_kl", "isolated_kl"]
    largest = expected[columns].abs().max()
    assert ((table[columns] - expected[columns]).abs() <= 1e-3 * largest).all(axis=None)
