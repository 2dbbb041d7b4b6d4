"""The tiny models are what the other tests stand on: they must be whole and the same on every run."""

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests import families, mixtures, tiny
from tests.conftest import ALIKE


@pytest.mark.parametrize("name", tiny.NAMES)
def test_same_name_same_bytes(name, tmp_path, tiny_folder):
    first, second = tiny_folder(name), tiny.write(name, tmp_path)
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert [x for x in files if (first / x).read_bytes() != (second / x).read_bytes()] == []
    assert AutoConfig.from_pretrained(first).architectures == [tiny.RECIPES[name].architecture]


@pytest.mark.parametrize("name", tiny.GENERATING_NAMES)
def test_any_answer_encodes_back_to_itself(name, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder(name))
    text = tokenizer.decode(range(tiny.FIRST_MARKER, tiny.VOCAB), skip_special_tokens=True)
    assert text.isascii() and len(text) > 300
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_models_that_quick_runs_leave_out_exist_and_others_stand_for_them():
    kinds = [{*tiny.NAMES}, {*mixtures.NAMES}, {*families.RECIPES}]
    assert set().union(*kinds) >= ALIKE
    assert all(names - ALIKE for names in kinds)
