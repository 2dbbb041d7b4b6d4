"""The rules of matching: known answers, and the running transformers' own function."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import MllamaConfig, Qwen2VLConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from qprobe.errors import ManifestError
from qprobe.exports import matchers
from qprobe.exports.matchers import hits, running_rule, transformers_rule
from qprobe.exports.targets import autoround, gptqmodel, llama_cpp, llm_compressor, peft, unsloth, vllm
from qprobe.loading.inventory import linear_modules
from qprobe.loading.skeleton import meta_model
from qprobe.models.families.mllama import UNSLOTH_LLAMA_11B


@pytest.fixture(scope="module")
def llama_11b() -> tuple[str, ...]:
    """Names of the 522 linears of Llama-3.2-11B-Vision."""
    return tuple(linear_modules(meta_model(MllamaConfig(), "bfloat16")))


@pytest.fixture(scope="module")
def qwen2_vl() -> tuple[str, ...]:
    """Names of Qwen2-VL-2B: 32 vision blocks of 4 linears, 2 in the merger, 28 layers of 7, the head."""
    return tuple(linear_modules(meta_model(Qwen2VLConfig(text_config={"num_hidden_layers": 28}), "bfloat16")))


def kept(rule, entries, names):
    return {name for entry in entries for name in hits(rule, entry, names)}


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (matchers.transformers_4, 7),
        (matchers.transformers_5_0, 77),  # layers 1 and 10 to 19: 11 layers of 7 linears
        (matchers.transformers_5_21, 7),
        (vllm.rule, 7),
    ],
)
def test_a_layer_number_without_a_boundary(llama_11b, rule, count):
    assert len(hits(rule, "model.language_model.layers.1", llama_11b)) == count


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        # The proj of 32 vision blocks and, as an ending, the 7 projections of 28 layers: 32 + 196.
        (matchers.transformers_5_21, 228),
        (matchers.transformers_5_0, 228),
        (matchers.transformers_4, 32),
        (vllm.rule, 32),
    ],
)
def test_a_bare_ending(qwen2_vl, rule, count):
    assert len(qwen2_vl) == 327
    assert len(hits(rule, "proj", qwen2_vl)) == count


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        # lm_head and multi_modal_projector; as endings also vision_model.transformer.layers.13.mlp.fc2.
        (matchers.transformers_4, 2),
        (matchers.transformers_5_21, 3),
    ],
)
def test_the_published_list_against_todays_names(llama_11b, rule, count):
    assert len(llama_11b) == 522
    assert len(kept(rule, UNSLOTH_LLAMA_11B.entries, llama_11b)) == count


def test_unsloths_own_patch_reads_its_list_as_it_was_meant(llama_11b):
    # 19 linears: all that the published list means to keep.
    assert len(kept(unsloth.rule, UNSLOTH_LLAMA_11B.entries, llama_11b)) == 19


PARTS = st.sampled_from(["model", "layers", "1", "11", "proj", "q_proj", "mlp", "lm_head"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
ENTRIES = NAMES | st.sampled_from(
    ["model.*", "layers|proj", "(?!model).*", ".", r"model\.layers\.1$", "_proj"]
)


@pytest.mark.slow
@given(NAMES, st.lists(ENTRIES, max_size=3))
def test_todays_rule_is_the_running_transformers(name: str, entries: list[str]):
    ours = any(running_rule()(entry, name) for entry in entries)
    assert ours == (not should_convert_module(name, entries))


@given(NAMES, NAMES)
def test_vllm_matches_a_whole_part_or_a_beginning_of_whole_parts(entry: str, name: str):
    # As the source says it: a part that equals the entry, or one of the name's dotted beginnings.
    parts = name.split(".")
    beginnings = {".".join(parts[: i + 1]) for i in range(len(parts))}
    assert vllm.rule(entry, name) == (entry in parts or entry in beginnings)


@pytest.mark.parametrize(
    ("rule", "entry", "name", "expected"),
    [
        (matchers.transformers_4, "fc1", "model.a.fc1", True),
        (
            matchers.transformers_4,
            "a.fc1",
            "model.a.fc1",
            False,
        ),  # an ending of two parts is none of its cases
        (matchers.transformers_4, "odel.a", "model.a.fc1", True),  # but any stretch before a dot is
        (llm_compressor.rule, "model.a", "model.a.fc1", False),
        (llm_compressor.rule, "re:model.a", "model.a.fc1", True),
        (llm_compressor.rule, "Linear", "model.a.fc1", True),
        (gptqmodel.rule, "-:model.a", "model.a.fc1", True),
        (gptqmodel.rule, "model.a", "model.a.fc1", False),  # settings of its own, but still quantized
        (autoround.rule, "^model.a$", "modelXa", False),  # its dots are plain dots
        (autoround.rule, "^model.a$", "model.a", True),
        (peft.rule, "q_proj", "a.q_proj", False),
        (peft.rule, ".*q_proj", "a.q_proj", True),
        (llama_cpp.rule, r"blk\.1\.ATTN_Q=bf16", "blk.1.attn_q.weight", True),
        (llama_cpp.rule, "1.attn_q=bf16", "blk.11.attn_q.weight", True),
    ],
)
def test_one_entry_and_one_name(rule, entry, name, expected):
    assert rule(entry, name) is expected


@pytest.mark.parametrize(
    ("release", "rule"),
    [
        ("4.46.2", matchers.transformers_4),
        ("4.57.6", matchers.transformers_4),
        ("5.0.0", matchers.transformers_5_0),
        ("5.20.2", matchers.transformers_5_0),
        ("5.21.0.dev0", matchers.transformers_5_21),
        ("5.23.0", matchers.transformers_5_21),
        (None, matchers.transformers_5_21),
        ("nonsense", matchers.transformers_5_21),
    ],
)
def test_the_rule_of_a_version(release, rule):
    assert transformers_rule(release)[1] is rule


def test_an_entry_that_is_no_pattern_is_named():
    with pytest.raises(ManifestError, match=re.escape("'*proj'")):
        hits(matchers.transformers_5_21, "*proj", ["a.proj"])
    assert hits(matchers.transformers_4, "*proj", ["a.proj"]) == ()  # plain text there


CORPUS = (
    "model", "model.", r"model\.a", "^model$", "(?:a|b)+", "[a-c]+", "a{2}", "a{,2}", "a{2,}", "a{e}",
    "a{e<=1}", "a{", "{", "x{1,2}{", "[[:alpha:]]", "[[a]", "[]a]", "[^]a]", "a|", "()", "(?P<n>a)(?P=n)",
    "(?i:A)", "(?s).", r"\d+", r"\w+\.\d", "a*?", "a++", "(?>a+)b", "(?=a)a", "(?<!b)a", r"\bfc1\b", r"\{",
    "a&&b", "[a&&b]", "a~b", "(?#x)a", "a{i<=1:[a-z]}", "a{1}{e}", "(?x)a b", "é", r"\x61", "$",
    "^", r"\Z", ".", "a.c", "[{e}]", "a{1,2}?",
)  # fmt: skip
STRINGS = (
    "", "a", "aa", "aab", "b", "ab", "model", "model.a", "fc1", "a{e}", "a{", "a{e<=1}", "al", "a]", "1", "A",
    "x{", "{", ":", "é", "c",
)  # fmt: skip


@pytest.mark.parametrize("how", ["match", "search", "fullmatch"])
def test_patterns_mean_what_re_makes_of_them(how: matchers.How):
    for pattern in CORPUS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            wanted = [getattr(re, how)(pattern, name) is not None for name in STRINGS]
        assert [matchers.finds(how, pattern, name) for name in STRINGS] == wanted, pattern


@pytest.mark.slow
@given(
    st.text("ab{}[]()|.*+?^$:e<1,\\d-&~", max_size=8),
    st.text("abed1{}.", max_size=6),
    st.sampled_from(["match", "search", "fullmatch"]),
)
def test_any_pattern_means_what_re_makes_of_it_or_is_none(pattern: str, name: str, how: matchers.How):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            wanted = getattr(re, how)(pattern, name) is not None
        except (re.error, OverflowError):
            with pytest.raises((re.error, OverflowError)):
                matchers.finds(how, pattern, name)
            return
    assert matchers.finds(how, pattern, name) is wanted


SLOW = r"(a|aa)+\d$"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "entry"),
    [
        (matchers.transformers_5_21, f"({SLOW})"),
        (matchers.transformers_5_0, SLOW),
        (llm_compressor.rule, f"re:{SLOW}"),
        (gptqmodel.rule, f"-:{SLOW}"),
        (autoround.rule, f"^{SLOW}$"),
        (peft.rule, SLOW),
        (llama_cpp.rule, f"{SLOW}=bf16"),
    ],
)
def test_an_entry_that_would_take_years_is_named_under_every_rule(
    rule: matchers.Rule, entry: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(matchers, "_SECONDS", 0.05)
    start = time.process_time()
    with pytest.raises(ManifestError, match=r"\(a\|aa\)\+.*takes more than"):
        hits(rule, entry, ["a" * 60 + "!"] * 50)
    assert time.process_time() - start < 3


def test_a_list_of_entries_that_are_each_a_little_slow_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matchers, "_OF_A_LIST", 0.05)

    def slow(entry: str, name: str) -> bool:
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass
        return True

    with pytest.raises(ManifestError, match=r"The entries up to 'e[0-9]+'"):
        matchers.all_hits(slow, [f"e{n}" for n in range(100)], ["a"])
