"""How many samples codes are fitted to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qprobe.calibration.settings import MORE_SAMPLES, fitted, samples_wanted
from qprobe.records import Sample

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("device", "wanted"), [(CPU, 0), (GPU, MORE_SAMPLES)])
def test_a_gpu_fits_codes_of_a_small_model_to_more_samples_than_are_measured(
    device: torch.device, wanted: int
):
    assert samples_wanted(nn.Linear(2, 2), device, None) == wanted


def test_a_model_too_large_for_float32_is_fitted_to_what_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qprobe.measure.attribution.FLOAT32_UP_TO", 0)
    assert samples_wanted(nn.Linear(2, 2, dtype=torch.bfloat16), GPU, None) == 0


@pytest.mark.parametrize("device", [CPU, GPU])
def test_as_many_as_are_asked_for(device: torch.device):
    assert samples_wanted(nn.Linear(2, 2), device, 7) == 7


def test_a_reader_is_told_of_samples_that_are_short_and_of_held_out_ones_where_there_are_any():
    one, two = [(Sample("a", ()),)], [(Sample("b", ()),) for _ in range(2)]
    alone = fitted(one, [], [])
    assert "held-out" not in alone and "asked for" not in alone
    assert "No code was fitted to the held-out samples." in fitted(one, [], one)
    assert "which are 1 of the 3 samples" in fitted(one, two, one, 3) and "asked for" not in fitted(
        one, two, one, 3
    )
    assert "Of the 4 samples asked for, codes were fitted to 3." in fitted(one, two, one, 4)
    assert "fitted to all 2 samples that are measured, more than the 1 asked for." in fitted(two, [], one, 1)
    assert "more than" not in fitted(two, [], one, 2)
