"""Lists that are asked for an engine keep whole what it fuses, so that its writer takes them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qprobe.errors import ManifestError, QprobeError
from qprobe.exports import export_manifest
from qprobe.records import Inventory
from qprobe.runs.folder import RunFolder
from qprobe.selection.budget import Budget
from qprobe.selection.candidates import candidates
from qprobe.selection.request import parse_request
from qprobe.selection.search.groups import grouped_for, keeps_groups_whole
from qprobe.selection.search.lists import best_skiplists
from qprobe.selection.select import scored_run
from tests.exports.manifests import of_tree
from tests.models import trees
from tests.report.runs import write_run
from tests.runs.runs import inventory_of, linear


def lists(inventory: Inventory, seed: int) -> list[tuple[str, ...]]:
    """The best lists by random scores at six budgets."""
    draw = random.Random(seed)
    scores = {x.name: draw.expovariate(1.0) for x in inventory.layers}
    standard = inventory.standard_4bit_bytes
    saved = inventory.total_bytes(frozenset(scores)) - standard
    limits = [standard + saved * part // 7 for part in range(1, 7)]
    return [skiplist.kept for skiplist in best_skiplists(inventory, scores, limits, "m")]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", trees.CONFIGS)
def test_every_list_for_vllm_can_be_written_for_it(architecture: str):
    inventory = grouped_for(trees.inventory(architecture), "vllm")
    for seed in range(5):
        found = lists(inventory, seed)
        assert any(found)  # a list that keeps nothing would show nothing
        for kept in found:
            assert keeps_groups_whole(inventory, kept)
            export_manifest(of_tree(architecture, kept), "vllm")


def test_without_it_cross_attention_may_be_split_and_the_error_says_what_to_do():
    architecture = "MllamaForConditionalGeneration"
    refused = 0
    for kept in lists(trees.inventory(architecture), 0):
        try:
            export_manifest(of_tree(architecture, kept), "vllm")
        except ManifestError as error:
            assert "--for vllm" in str(error)
            refused += 1
    assert refused > 0


def test_the_layers_stay_the_same_and_another_tool_is_refused():
    inventory = trees.inventory("MllamaForConditionalGeneration")
    grouped = grouped_for(inventory, "vllm")
    assert [x.name for x in grouped.layers] == [x.name for x in inventory.layers]
    assert grouped.standard_4bit_bytes == inventory.standard_4bit_bytes
    assert grouped_for(inventory, None) is inventory
    with pytest.raises(QprobeError, match=r"'sglang' is no tool .* one of vllm"):
        parse_request(for_tool="sglang")


def test_a_group_is_whole_without_its_fixed_layers():
    inventory = inventory_of(linear("a.q", "g"), linear("a.k", "g", fixed="tied"), linear("a.v", "g"))
    assert keeps_groups_whole(inventory, ["a.q", "a.v"]) and keeps_groups_whole(inventory, [])
    assert not keeps_groups_whole(inventory, ["a.q"])


class Published:
    """A list that keeps the query of one layer alone."""

    author = "somebody"

    def kept(self, inventory: Inventory) -> frozenset[str]:
        return frozenset(x.name for x in inventory.layers if x.name.endswith("layers.1.self_attn.q_proj"))


@pytest.mark.parametrize(("tool", "there"), [(None, True), ("vllm", False)])
def test_every_candidate_keeps_groups_whole(
    tool: str | None, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_run(tmp_path)
    entry = type("Entry", (), {"published": (Published(),)})
    monkeypatch.setattr("qprobe.selection.candidates.find", lambda _: entry)
    request = parse_request(for_tool=tool)
    inventory = RunFolder(tmp_path).scan.inventory
    everything = inventory.total_bytes(frozenset(x.name for x in inventory.layers))
    budget = Budget("half", (inventory.standard_4bit_bytes + everything) // 2)
    skiplists = candidates(scored_run(RunFolder(tmp_path), request), request, budget)
    assert ("somebody" in skiplists) == there
    grouped = grouped_for(inventory, "vllm")
    assert all(keeps_groups_whole(grouped, x.kept) for x in skiplists.values()) != there
