"""Options from Python take the words that the command line takes, and no others."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qprobe.errors import QprobeError
from qprobe.options import CompareOptions, FinetuneOptions, ScanOptions, data_of, names_of, path_of

GIVEN = {
    ScanOptions: ScanOptions("demo"),
    CompareOptions: CompareOptions(Path("skiplist.json")),
    FinetuneOptions: FinetuneOptions("skiplist.json", data="a.jsonl", out="out"),
}


@pytest.mark.parametrize(
    "kind, name, word",
    [
        (FinetuneOptions, "base", "8-bit"),
        (FinetuneOptions, "optimizer", "sgd"),
        (FinetuneOptions, "dtype", "int8"),
        (FinetuneOptions, "base", None),
        (ScanOptions, "dtype", "float32"),
        (ScanOptions, "turns", "all"),
        (CompareOptions, "bad_data", True),
    ],
)
def test_a_word_that_is_no_choice_is_named_with_those_that_are(kind: type, name: str, word: object):
    with pytest.raises(QprobeError, match=f"{name}={word!r} is not taken. Pass one of '"):
        replace(GIVEN[kind], **{name: word})


@pytest.mark.parametrize(
    "name, given, wanted",
    [
        ("samples", "8", "Expected `int | None`, got `str`"),
        ("samples", True, "Expected `int | None`, got `bool`"),
        ("budget", 10, "Expected `str | None`, got `int`"),
        ("max_kl", "0.1", "Expected `float | None`, got `str`"),
    ],
)
def test_a_value_of_another_type_is_named_with_the_one_that_is_taken(name: str, given: object, wanted: str):
    with pytest.raises(QprobeError, match=re.escape(f"{name}={given!r} is not taken. {wanted}.")):
        replace(GIVEN[ScanOptions], **{name: given})


def test_a_whole_number_is_a_number():
    assert replace(GIVEN[ScanOptions], max_kl=1).max_kl == 1


def test_names_are_a_sequence_or_have_commas_between_them():
    assert names_of("weight, activation") == names_of(["weight", "activation"]) == ("weight", "activation")


def test_what_is_no_path_is_named():
    with pytest.raises(QprobeError, match="A value of type dict is given where a path is wanted"):
        path_of({})
    for read in (path_of, data_of):
        with pytest.raises(QprobeError, match="The path is empty"):
            read("")


def test_every_word_is_taken_and_none_where_it_may_be_left_out():
    assert [replace(GIVEN[FinetuneOptions], base=x).base for x in ("16-bit", "nf4", "dynamic")]
    assert replace(GIVEN[ScanOptions], dtype=None).dtype is None
