"""Options from Python take the words that the command line takes, and no others."""

from dataclasses import replace
from pathlib import Path

import pytest

from qprobe.errors import QprobeError
from qprobe.options import CompareOptions, FinetuneOptions, ScanOptions

GIVEN = {
    ScanOptions: ScanOptions("demo"),
    CompareOptions: CompareOptions(Path("skiplist.json")),
    FinetuneOptions: FinetuneOptions(Path("skiplist.json"), Path("a.jsonl"), Path("out")),
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
    with pytest.raises(QprobeError, match=f"{name}={word!r} is no choice. Pass one of '"):
        replace(GIVEN[kind], **{name: word})


def test_every_word_is_taken_and_none_where_it_may_be_left_out():
    assert [replace(GIVEN[FinetuneOptions], base=x).base for x in ("16-bit", "nf4", "dynamic")]
    assert replace(GIVEN[ScanOptions], dtype=None).dtype is None
