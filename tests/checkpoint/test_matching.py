"""The keys given to transformers convert exactly the wanted modules, by its own matcher."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qprobe.checkpoint.matching import skip_keys
from qprobe.errors import VerificationError
from qprobe.loading.config import load_config
from qprobe.loading.inventory import converted_modules
from qprobe.loading.skeleton import meta_model
from qprobe.loading.source import resolve
from tests import tiny


class Awkward(nn.Module):
    """Names that plain keys confuse: endings of each other, numbers, a dot that reads as any character."""

    NAMES = ("proj", "a.proj", "a.b", "aXb", "layers.1.fc", "layers.11.fc", "fc")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            owner = self
            for part in name.split(".")[:-1]:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(name.split(".")[-1], nn.Linear(2, 2))


@pytest.mark.slow
@given(st.sets(st.sampled_from(Awkward.NAMES)))
@settings(max_examples=128, deadline=None)
def test_any_choice_among_awkward_names_is_met(four_bit):
    model = Awkward()
    assert converted_modules(model, skip_keys(model, four_bit)) == four_bit


def test_plain_names_would_keep_too_much():
    # The trap itself: transformers reads "proj" as an ending, so "a.proj" would stay in 16-bit too.
    assert converted_modules(Awkward(), ["proj"]) == set(Awkward.NAMES) - {"proj", "a.proj"}


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_plain_names_are_used_where_they_are_exact(name, tiny_folder):
    model = meta_model(load_config(resolve(str(tiny_folder(name)))), "bfloat16")
    names = [x for x, _ in model.named_modules() if x in converted_modules(model)]
    for four_bit in (names, names[::2], names[:1], ()):
        keys = skip_keys(model, four_bit)
        assert keys == [x for x in names if x not in four_bit]
        assert converted_modules(model, keys) == set(four_bit)


def test_what_the_models_class_always_keeps_is_an_error_before_loading():
    model = Awkward()
    model._keep_in_fp32_modules = {"fc"}
    with pytest.raises(VerificationError, match=r"layers\.1\.fc.*keeps fc in 16-bit"):
        skip_keys(model, Awkward.NAMES)
    assert converted_modules(model, [*skip_keys(model, ["a.b"]), "fc"]) == {"a.b"}
