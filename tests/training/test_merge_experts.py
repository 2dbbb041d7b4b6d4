"""A merge of a mixture: into 16-bit always, into 4-bit where plain transformers loads what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qprobe.errors import ManifestError, ModelError
from qprobe.manifest.write import write_manifest
from qprobe.options import Base
from qprobe.training.merging import merge as merging
from qprobe.training.merging.merge import merge
from tests.checkpoint.manifests import inventory_of, manifest_for
from tests.training.adapters import write_adapter

pytestmark = [
    pytest.mark.slow,
    # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def asked(mixture: Callable[[str], Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`asked(name, kept)`: a merge of an adapter on that mixture, whose last `kept` experts are in 16-bit."""

    def options(name: str, kept: int) -> dict[str, Any]:
        source = mixture(name)
        experts = [x.name for x in inventory_of(source).layers if x.experts]
        write_manifest(tmp_path / "skiplist.json", manifest_for(source, experts[len(experts) - kept :]))
        return {
            "adapter": write_adapter(source, tmp_path / "adapter"), "manifest": tmp_path / "skiplist.json",
            "out": tmp_path / "out", "model": str(source), "device": "cpu", "samples": 1, "max_new_tokens": 2,
        }  # fmt: skip

    return options


@pytest.mark.parametrize(("base", "kept"), [("nf4", 4), ("nf4", 0), ("dynamic", 1), ("16-bit", 1)])
def test_a_merge_that_would_have_experts_in_4_bit_is_refused_before_weights_are_loaded(
    base: Base, kept: int, asked: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(merging, "_merged", lambda *_: pytest.fail("weights are loaded"))
    with pytest.raises(ManifestError, match=r"The experts model\.layers\.0\..* are in 4-bit.*--as 16-bit"):
        merge(**asked("qwen3_moe", kept), base=base)


def test_what_transformers_would_rewrite_is_refused_before_weights_are_loaded(
    asked: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(merging, "_merged", lambda *_: pytest.fail("weights are loaded"))
    with pytest.raises(ModelError, match="when it reads a 4-bit checkpoint"):
        merge(**asked("llama4", 4))


@pytest.mark.parametrize(("base", "kept"), [("nf4", 4), ("dynamic", 0)])
def test_an_adapter_trained_beside_experts_in_4_bit_merges_into_16_bit(
    base: Base, kept: int, asked: Callable[..., dict[str, Any]]
):
    made = merge(**asked("qwen3_moe", kept), base=base, as_="16-bit")
    assert made.form == "16-bit" and made.row.kl is not None and made.arrived == pytest.approx(1, abs=0.01)


def test_experts_in_16_bit_merge_into_4_bit(asked: Callable[..., dict[str, Any]]):
    made = merge(**asked("qwen3_moe", 4), as_="4-bit")
    assert made.rounding == "nearest" and made.arrived > 0.9
