"""Each disagreement of files, config and manifest is one sentence that counts and names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qprobe.checkpoint.auditing.found import AuditedLayer
from qprobe.checkpoint.auditing.problems import _some, against, two_checkpoints
from qprobe.manifest.records import Manifest
from tests.checkpoint.manifests import inventory_of, manifest_for

KEPT = "model.layers.1.mlp.up_proj"


def test_of_many_names_three_are_shown_and_the_others_counted():
    assert _some(["a"]) == "a" and _some(["a", "b", "c"], "; ") == "a; b; c"
    assert _some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert _some(["a", "b", "c"], shown=1) == "a and 2 more"


@pytest.fixture(scope="module")
def manifest(tiny_folder: Any) -> Manifest:
    return manifest_for(tiny_folder("llama"), [KEPT])


def said(manifest: Manifest, folder: Path, states: dict[str, str], more_bytes: int = 0) -> list[str]:
    """Where `manifest` disagrees with files in which its layers are as it says but for `states`."""
    own = {x.name: "4-bit" if x.is_four_bit else "16-bit" for x in manifest.layers} | states
    layers: list[Any] = [AuditedLayer(name, state, None) for name, state in own.items()]  # type: ignore[arg-type]
    total = manifest.budget.total_bytes + more_bytes
    return list(against(manifest, manifest.model.architecture, inventory_of(folder), layers, total))


def test_layers_in_another_precision_than_the_manifest_s_are_counted_by_direction(
    manifest: Manifest, tiny_folder: Any
):
    folder = tiny_folder("llama")
    four_bit = [x.name for x in manifest.layers if x.is_four_bit]
    assert said(manifest, folder, {}) == []
    assert said(manifest, folder, {four_bit[0]: "packed in a 16-bit class"}) == []
    assert said(manifest, folder, {KEPT: "4-bit"}) == [
        f"1 linear is in 4-bit, though the manifest keeps them: {KEPT}."
    ]
    assert said(manifest, folder, {KEPT: "packed in a 16-bit class", four_bit[0]: "16-bit"}) == [
        f"1 linear is in 4-bit, though the manifest keeps them: {KEPT}.",
        f"1 linear is in 16-bit, though the manifest does not: {four_bit[0]}.",
    ]
    assert said(manifest, folder, dict.fromkeys(four_bit[:5], "16-bit"), 7) == [
        f"5 linears are in 16-bit, though the manifest does not: {', '.join(four_bit[:3])} and 2 more."
    ]
    assert said(manifest, folder, {four_bit[0]: "missing"}) == []
    (bytes_alone,) = said(manifest, folder, {}, 8)
    total = manifest.budget.total_bytes
    assert bytes_alone.startswith(f"The files hold {total + 8:,} bytes, but the manifest expected {total:,}")


def test_a_manifest_of_another_model_is_told_by_class_and_first_layer(manifest: Manifest, tiny_folder: Any):
    folder = tiny_folder("llama")
    other = replace(manifest, layers=manifest.layers[1:])
    (sentence,) = said(other, folder, {manifest.layers[0].name: "16-bit"})
    assert f"only one of them has {manifest.layers[0].name} of shape" in sentence
    layers = inventory_of(folder)
    (sentence,) = against(manifest, "OtherForCausalLM", layers, [], 0)
    assert sentence.endswith("but this is a OtherForCausalLM of 0.")


def test_a_folder_with_two_checkpoints_is_told(tmp_path: Path):
    assert list(two_checkpoints(tmp_path)) == []
    (tmp_path / "model.safetensors").touch()
    assert list(two_checkpoints(tmp_path)) == []
    (tmp_path / "model.safetensors.index.json").touch()
    (sentence,) = two_checkpoints(tmp_path)
    assert "holds model.safetensors and model.safetensors.index.json" in sentence
    (tmp_path / "model.safetensors").unlink()
    assert list(two_checkpoints(tmp_path)) == []
