"""Every model known by name: its geometry against counts stated elsewhere, its towers, its fused groups."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from functools import cache

import pytest

from qprobe.checkpoint.plan import plan
from qprobe.exports.languages import transformers_language
from qprobe.exports.lists import match_list
from qprobe.loading.config import catalogue_config
from qprobe.loading.inventory import list_layers
from qprobe.loading.skeleton import meta_model
from qprobe.models.catalogue import entries, find, nearest
from qprobe.models.entry import Entry
from qprobe.models.families import family_of
from qprobe.models.families.mllama import UNSLOTH_LLAMA_11B
from qprobe.models.families.qwen2_5_vl import VECTORDB_QWEN_3B
from qprobe.models.family import FUSED, FUSED_CROSS, OTHER, PROJECTOR, VISION
from qprobe.models.geometry import FOLDER, Sizes, read_geometry
from qprobe.records import FormatSpec, Inventory
from tests.loading import by_hand

ALIASES = [entry.alias for entry in entries()]
QUICK = {"llama-3.2-11b-vision", "qwen2-vl-2b", "llava-1.5-7b", "smolvlm2"}
"""Those whose skeleton is built by `make quick`, too."""
EACH = [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in ALIASES]
GEOMETRIES = sorted(path.stem for path in FOLDER.glob("*.json"))
BUFFERS = {
    "glm-4.5v": 45 * 128 * 4,  # what routers add to their scores, in float32
    "gemma-4-26b-a4b": 2 * (2 * 1152 + 30),  # what standardizes vision tokens, a scalar per layer
}
"""Bytes of the buffers that are saved with a model."""


def test_the_quick_ones_are_in_the_catalogue():
    assert set(ALIASES) > QUICK


@cache
def built(geometry: str) -> tuple[str, int, Inventory]:
    """Class, parameter count and inventory of a geometry; built once for all that share it."""
    entry = next(e for e in entries() if e.geometry == geometry)
    model = meta_model(catalogue_config(entry), "bfloat16")
    return type(model).__name__, sum(p.numel() for p in model.parameters()), list_layers(model, FormatSpec())


def entry_of(alias: str) -> Entry:
    entry = find(alias)
    assert entry is not None
    return entry


@pytest.mark.slow
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_geometry_has_the_parameters_stated_elsewhere_and_the_stored_sizes(name: str) -> None:
    geometry = read_geometry(name)
    _, parameters, inventory = built(name)
    assert parameters == geometry.parameters
    everything = frozenset(x.name for x in inventory.layers)
    quantized = [x for x in inventory.layers if not x.fixed]
    scales = [-(-(x.experts or 1) * x.in_features * x.out_features // 64) for x in quantized]
    assert geometry.sizes == Sizes(
        linear_layers=len(inventory.layers),
        bytes_16bit=inventory.total_bytes(everything),
        nf4_layers=len(quantized),
        # Without state: less a byte for each block of 64 and 4 for each 256 of those.
        nf4_parameter_bytes=inventory.standard_4bit_bytes - sum(n + 4 * -(-n // 256) for n in scales),
        nf4_total_bytes=inventory.standard_4bit_bytes,
    )
    assert geometry.sizes.bytes_16bit == 2 * parameters + BUFFERS.get(name, 0)


@pytest.mark.parametrize("name", sorted(by_hand.COUNTS))
def test_a_count_by_hand_is_that_of_the_geometry(name: str) -> None:
    assert by_hand.COUNTS[name] == read_geometry(name).parameters


def test_every_count_is_published_or_derived_here_and_says_where() -> None:
    kinds = defaultdict(set)
    for name in GEOMETRIES:
        geometry = read_geometry(name)
        kinds[geometry.parameters_are].add(name)
        assert geometry.source and geometry.parameters_source
    assert kinds["own"] == {"demo"} and kinds["derived"] <= by_hand.COUNTS.keys()
    assert kinds.keys() == {"own", "derived", "published"}


def test_every_geometry_is_used() -> None:
    assert set(GEOMETRIES) == {entry.geometry for entry in entries()}


@pytest.mark.slow
@pytest.mark.parametrize("alias", EACH)
def test_every_linear_of_an_entry_is_in_exactly_one_tower(alias: str) -> None:
    entry = entry_of(alias)
    architecture, _, inventory = built(entry.geometry)
    assert architecture == entry.architecture
    towers = family_of(architecture).towers
    for layer in inventory.layers:
        met = [tower for tower, pattern in towers if re.search(pattern, layer.name)]
        assert met == [layer.tower] and layer.tower != OTHER, layer.name


@pytest.mark.slow
@pytest.mark.parametrize("alias", EACH)
def test_every_fused_group_of_an_entry_is_whole(alias: str) -> None:
    _, _, inventory = built(entry_of(alias).geometry)
    groups: dict[str, list[str]] = defaultdict(list)
    towers: dict[str, set[str]] = defaultdict(set)
    for layer in inventory.layers:
        groups[layer.group].append(layer.name)
        towers[layer.group].add(layer.tower)
    assert all(len(found) == 1 for found in towers.values())
    alone = {name for names in groups.values() if len(names) == 1 for name in names}
    for names in groups.values():
        if len(names) > 1:
            (parent,) = {name.rpartition(".")[0] for name in names}
            leaves = {name.rpartition(".")[2] for name in names}
            known = (*FUSED, *FUSED_CROSS, *family_of(entry_of(alias).architecture).fused)
            assert leaves in [set(members) for members in known], parent
    # No half of a pair stands alone; only the queries of cross-attention are meant to.
    leaves_alone = {name.rpartition(".")[2] for name in alone if ".cross_attn." not in name}
    assert leaves_alone.isdisjoint(x for members in FUSED for x in members)


@pytest.mark.slow
@pytest.mark.parametrize("alias", ["qwen2-vl-2b", "qwen2.5-vl-7b"])
def test_one_linear_that_holds_q_k_and_v_is_a_group_of_its_own(alias: str) -> None:
    _, _, inventory = built(entry_of(alias).geometry)
    joint = [x for x in inventory.layers if x.name.endswith(".attn.qkv")]
    assert len(joint) == 32 and all(x.group == x.name and x.tower == VISION for x in joint)


@pytest.mark.slow
def test_gemma_3_has_a_projector_without_a_linear() -> None:
    projector = {t.name: t for t in plan("gemma-3-4b").towers}["projector"]
    # mm_input_projection_weight of 1152 x 2560 and a norm of 1152, in 16-bit in every layout
    assert (projector.linear_layers, projector.parameters) == (0, 1152 * 2560 + 1152)
    assert {size.total_bytes for size in projector.layouts.values()} == {2 * (1152 * 2560 + 1152)}


@pytest.mark.parametrize(
    "alias",
    [
        *(f"llama-3.2-{size}-vision{tuned}" for size in ("11b", "90b") for tuned in ("", "-instruct")),
        *(f"qwen2-vl-{size}{tuned}" for size in ("2b", "7b", "72b") for tuned in ("", "-instruct")),
        *(f"qwen2.5-vl-{size}" for size in ("3b", "7b", "72b")),
        *(
            "pixtral-12b",
            "llava-1.5-7b",
            "llava-next",
            "idefics3-8b",
            "smolvlm2",
            "paligemma",
            "internvl3-1b",
        ),
        *(f"gemma-3-{size}" for size in ("4b", "12b", "27b")),
        *("qwen3-vl-30b-a3b", "llama-4-scout", "glm-4.5v", "gemma-4-26b-a4b"),
        *("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen3-0.6b", "demo", "demo-outliers"),
    ],
)
def test_these_names_are_known_in_upper_and_lower_case(alias: str) -> None:
    assert find(alias.upper()) is find(alias) is not None


def test_a_name_is_given_once_and_a_hub_id_leads_to_its_geometry() -> None:
    assert len(set(ALIASES)) == len(ALIASES)
    for entry in entries():
        found = find(entry.hub_id or entry.alias)
        assert found is not None and (found.hub_id, found.geometry) == (entry.hub_id, entry.geometry)


def test_base_and_tuned_llama_11b_differ_in_their_tiles() -> None:
    # 448 against 560 pixels: 32 * 32 against 40 * 40 patches of 14, in a table of positions and in one of
    # 4 tiles for 9 aspect ratios, 1280 wide.
    base, tuned = find("meta-llama/Llama-3.2-11B-Vision"), find("meta-llama/Llama-3.2-11B-Vision-Instruct")
    assert base is not None and tuned is not None
    counts = [read_geometry(x.geometry).parameters for x in (base, tuned)]
    assert counts[1] - counts[0] == (40 * 40 - 32 * 32) * 1280 * (1 + 4 * 9)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("llama-3.2-11b-vison", "llama-3.2-11b-vision"),
        ("Qwen2.5-VL-7b-Instrct", "qwen2.5-vl-7b-instruct"),
        ("pixtral", "pixtral-12b"),
        ("qwen2-vl", "qwen2-vl-2b"),
        ("meta/llama-3.1-8b", "llama-3.1-8b"),
    ],
)
def test_the_nearest_name_comes_first(typed: str, meant: str) -> None:
    assert nearest(typed)[0] == meant


def test_an_alias_names_the_generation_that_its_checkpoint_is_of() -> None:
    for entry in entries():
        digits = re.match(r"[a-z]+(\d*)", entry.alias)
        if entry.alias.startswith("smolvlm") and digits and entry.hub_id:
            assert f"/smolvlm{digits[1]}-" in entry.hub_id.lower(), entry.alias
    assert find("smolvlm") is None and "smolvlm2" in nearest("smolvlm")


def test_nothing_is_near_to_nonsense() -> None:
    assert nearest("zzzz") == ()


@pytest.mark.slow
def test_entries_of_a_published_list_that_match_nothing_are_told() -> None:
    _, _, inventory = built("llama-3.2-11b-vision")
    assert UNSLOTH_LLAMA_11B.dead(inventory) == ("merger", "modality_projection")


@pytest.mark.slow
@pytest.mark.parametrize("alias", EACH)
def test_every_entry_of_a_published_list_names_a_linear_of_its_model(alias: str) -> None:
    entry = entry_of(alias)
    _, _, inventory = built(entry.geometry)
    authors = [x.author for x in entry.published]
    assert len(authors) == len(set(authors))
    for one in entry.published:
        assert one is UNSLOTH_LLAMA_11B or one.dead(inventory) == ()
        assert any(x.name in one.kept(inventory) for x in inventory.layers if not x.fixed)


@pytest.mark.slow
@pytest.mark.parametrize("alias", EACH)
def test_import_reads_every_published_list_as_plan_counts_it(alias: str) -> None:
    entry = entry_of(alias)
    architecture, _, inventory = built(entry.geometry)
    language = transformers_language("4.57.6")  # of the checkpoints that carry such lists
    for one in entry.published:
        matched = match_list(one.entries, inventory, language, architecture)
        assert frozenset(name for x in matched for name in x.layers) == one.kept(inventory)


@pytest.mark.slow
@pytest.mark.parametrize("alias", ["qwen2-vl-2b", "llava-1.5-7b"])
def test_unsloths_rule_keeps_vision_and_projector_whole_and_nothing_of_the_decoder(alias: str) -> None:
    entry = entry_of(alias)
    _, _, inventory = built(entry.geometry)
    (rule,) = entry.published
    vision = {x.name for x in inventory.layers if x.tower in (VISION, PROJECTOR)}
    assert rule.kept(inventory) == vision | {x.name for x in inventory.layers if x.fixed}


@pytest.mark.slow
def test_the_list_for_qwen2_5_vl_3b_keeps_58_linears_and_the_head() -> None:
    _, _, inventory = built("qwen2.5-vl-3b")
    # 8 blocks' attention of 2, 13 blocks' MLP of 3, one more down_proj, the merger of 2, and lm_head.
    assert len(VECTORDB_QWEN_3B.kept(inventory)) == 8 * 2 + 13 * 3 + 1 + 2 + 1


def test_building_leaves_the_stored_config_as_it_was() -> None:
    path = FOLDER / "llava-1.5-7b.json"
    catalogue_config(entry_of("llava-1.5-7b"))
    assert read_geometry("llava-1.5-7b").config == json.loads(path.read_text())["config"]
