"""Devices as they are typed."""

import pytest

from qprobe.errors import MachineError
from qprobe.system.devices import BEST, AskedDevice, parse_device


@pytest.mark.parametrize(
    "text, asked",
    [
        ("cpu", AskedDevice("cpu")),
        ("cuda", AskedDevice("cuda")),
        ("cuda:1", AskedDevice("cuda", 1)),
        ("auto", AskedDevice("auto")),
    ],
)
def test_a_device_is_read_and_written_as_it_is_typed(text: str, asked: AskedDevice):
    assert parse_device(text) == asked and str(asked) == text


def test_no_word_is_the_best_there_is_which_stands_for_all_gpus_where_one_is_wanted():
    assert parse_device(None) == BEST == AskedDevice("auto").one
    assert AskedDevice("cuda", 1).one == AskedDevice("cuda", 1)
    assert BEST.may_be_all and not AskedDevice("cuda").may_be_all


@pytest.mark.parametrize("text", ["", "gpu", "mps", "cuda:", "cuda:-1", "cuda:1000", "CUDA", "auto:1", 1])
def test_other_words_are_no_device(text):
    with pytest.raises(MachineError, match="is not a device name"):
        parse_device(text)
