"""Which candidate a merge keeps, by hand-made KLs."""

from __future__ import annotations

import pytest

from qprobe.checkpoint.comparing.course import ModelResult
from qprobe.checkpoint.storage import StoredBytes
from qprobe.errors import ModelError
from qprobe.measure.kl import KlSums
from qprobe.training.merging.merged import chosen


def result(*kl: float) -> ModelResult:
    return ModelResult(StoredBytes(1, 1), [""] * len(kl), [KlSums(x, 1, 1) for x in kl], [])


@pytest.mark.parametrize(
    ("nearest", "codes", "sixteen", "kept"),
    [
        ((3, 3, 3), (1, 1, 1), (2, 2, 2), "4-bit, calibrated"),
        ((1, 1, 1), (3, 3, 3), (2, 2, 2), "4-bit"),
        ((3, 3, 3), (3, 3, 3), (4, 4, 4), "4-bit"),  # no better than nearest, so nothing to fit for
        ((5, 5, 5), (4, 4, 4), (2, 2, 2), "16-bit"),
        ((5, 5, 5), (1, 9, 2), (2, 6, 1), "4-bit, calibrated"),  # against 16-bit -1, 3, 1: no difference
    ],
)
def test_the_better_rounding_is_kept_and_then_the_better_form(nearest, codes, sixteen, kept):
    results = {
        "16-bit": result(*sixteen), "4-bit": result(*nearest), "4-bit, calibrated": result(*codes),
    }  # fmt: skip
    found, why = chosen(results)
    better = "calibrated" if sum(codes) < sum(nearest) else "nearest"
    assert found == kept and why.endswith(f"Of both roundings to 4-bit, {better} has the lower KL.")
    without, why = chosen({"16-bit": result(*sixteen), "4-bit": result(*nearest)})
    assert without in ("16-bit", "4-bit") and "roundings" not in why


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("sixteen", "nearest", "codes", "kept", "said"),
    [
        ((NAN, 1), (INF, 1), (5, 5), "4-bit, calibrated", "4-bit was kept. The KL of 16-bit and 4-bit is "),
        ((5, 5), (NAN, 1), (INF, 1), "16-bit", "16-bit was kept. The KL of 4-bit and 4-bit, calibrated is "),
        ((9, 8), (NAN, 1), (2, 2), "4-bit, calibrated", "nats per answer token. The KL of 4-bit is "),
        ((9, 8), (2, 2), (NAN, 1), "4-bit", "nats per answer token. The KL of 4-bit, calibrated is "),
    ],
)
def test_what_has_no_kl_is_never_kept(sixteen, nearest, codes, kept, said):
    results = {
        "16-bit": result(*sixteen), "4-bit": result(*nearest), "4-bit, calibrated": result(*codes),
    }  # fmt: skip
    found, why = chosen(results)
    assert found == kept and why.endswith(f"{said}NaN or infinite.")


def test_a_merge_of_which_no_form_has_a_kl_is_refused():
    for form in ("16-bit", "4-bit"):
        with pytest.raises(ModelError, match=f"^The KL of {form} to base .* is NaN or infinite"):
            chosen({form: result(1, NAN)})
