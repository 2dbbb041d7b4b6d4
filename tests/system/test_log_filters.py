"""What other packages say in vain is left out, and nothing of the user's own."""

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils.deprecation import deprecate_kwarg

from qprobe.loading.log_filters import quiet_models


class Renamed(torch.nn.Module):
    """A layer of transformers whose argument has a new name."""

    @deprecate_kwarg("hidden_state", new_name="hidden_states", version="99.0.0")
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class Own(torch.nn.Module):
    """A layer of the user's that warns of its caller."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        warnings.warn("this layer goes next year", FutureWarning, stacklevel=2)
        return x


def test_old_names_that_models_pass_to_their_own_layers_are_not_told():
    with pytest.warns(FutureWarning, match="`hidden_state` is deprecated"):
        Renamed()(hidden_state=torch.ones(1))
    with quiet_models():  # warnings are errors here
        assert Renamed()(hidden_state=torch.ones(1)) == 1
        assert checkpoint(Renamed().forward, hidden_state=torch.ones(1), use_reentrant=False) == 1


def test_warnings_of_the_user_s_own_pass():
    with quiet_models(), pytest.warns(FutureWarning, match="next year"):
        Own()(torch.ones(1))
    with quiet_models(), pytest.warns(FutureWarning, match="`a` is deprecated"):
        warnings.warn("`a` is deprecated and goes for `b.forward`", FutureWarning, stacklevel=1)


def test_filters_are_as_before_afterwards():
    before = list(warnings.filters)
    with pytest.raises(ZeroDivisionError), quiet_models():
        raise ZeroDivisionError
    assert warnings.filters == before
