"""The shared nouns."""

import hashlib
from math import inf, isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe.records import ErrorSums, Fact, Inventory, Linear, Sample, Turn, asked


@pytest.mark.parametrize(
    ("answer", "stated"),
    [
        ("The angle is 40 degrees.", True),
        ("ANGLE: 40 Degrees", True),
        ("140 degrees", False),  # a longer number is another number
        ("40 degreesx", False),
        ("", False),
    ],
)
def test_a_fact_is_stated_only_as_whole_words(answer: str, stated: bool):
    assert Fact("angle", "40 degrees").stated_in(answer) is stated


def test_a_phrase_is_no_pattern():
    assert not Fact("size", "1.5").stated_in("1x5")
    assert Fact("code", "A+").stated_in("grade A+ today")


def test_digest_separates_prompt_and_answer():
    # Without lengths both would hash "abc".
    assert Sample("x", asked("ab"), "c").digest != Sample("x", asked("a"), "bc").digest


def test_digest_ignores_names_and_facts():
    plain = Sample("x", asked("p", b"i"), "a")
    assert plain.digest == Sample("y", asked("p", b"i"), "a", True, (Fact("f", "g"),), "medical").digest
    assert plain.digest != Sample("x", asked("p", b"j"), "a").digest


def test_the_digest_of_one_question_is_over_image_prompt_and_answer():
    sha = hashlib.sha256()
    for part in (b"i", b"p", b"a"):
        sha.update(len(part).to_bytes(8, "little") + part)
    assert Sample("x", asked("p", b"i"), "a").digest == sha.hexdigest()


def test_digests_tell_apart_where_an_image_stands_and_who_speaks():
    system = (Turn("system", ("p",)), Turn("user", ("q",)))
    ways = [
        asked("p", b"q"),
        (Turn("user", ("p", b"q")),),
        (Turn("user", (b"q", b"p")),),
        (Turn("user", (b"qp",)),),
        (Turn("user", ("pq",)),),
        (Turn("user", ("p", "q")),),
        system,
        (Turn("user", ("p",)), Turn("assistant", ("q",))),
    ]
    assert len({Sample("x", turns).digest for turns in ways}) == len(ways)


def test_nmse_pools_energy_before_dividing():
    # (1 + 1) / (100 + 1); averaging the two ratios would give 0.505
    total = ErrorSums(n=1, signal=100.0, noise=1.0) + ErrorSums(n=1, signal=1.0, noise=1.0)
    assert total.nmse == 2 / 101


def test_nothing_summed_is_unknown_and_an_exact_copy_is_infinitely_good():
    assert isnan(ErrorSums().nmse) and isnan(ErrorSums().sqnr_db)
    assert isnan(ErrorSums(n=3, signal=0.0, noise=1.0).nmse)
    assert ErrorSums(n=3, signal=2.0).sqnr_db == inf
    assert ErrorSums(n=1, signal=1000.0, noise=1.0).sqnr_db == pytest.approx(30)  # -10 log10(1e-3)


sums = st.builds(ErrorSums, *(st.integers(0, 1000).map(f) for f in (int, float, float, int)))


@given(sums, sums, sums)
def test_merge_of_error_sums_has_no_order(a: ErrorSums, b: ErrorSums, c: ErrorSums):
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + ErrorSums() == a


def test_total_bytes_counts_fixed_layers_in_16_bit():
    def layer(name: str, fixed: str | None = None) -> Linear:
        return Linear(name, name, "language", name, (1, 4), 3, 8, fixed)

    inventory = Inventory((layer("a"), layer("b"), layer("lm_head", "lm_head")), (), 100)
    assert inventory.standard_4bit_bytes == 100 + 3 + 3 + 8
    assert inventory.total_bytes(frozenset({"b"})) == 100 + 3 + 8 + 8
    assert inventory.total_bytes(frozenset({"lm_head"})) == inventory.standard_4bit_bytes
