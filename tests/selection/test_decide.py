"""Which list is taken, from KL measured on held-out samples, and what the verdict says of it."""

from math import inf, isnan, nan, sqrt

import pandas as pd
import pytest

from qprobe.runs.statistics import ratio_se
from qprobe.selection.decide import Candidate, decide, difference, on_common_samples
from qprobe.selection.verdict import (
    calibration_verdict,
    difference_text,
    is_bent,
    mean_text,
    residual_verdict,
    verdict,
    with_error,
)


def candidate(name: str, total_bytes: int, *kl: float, kept: tuple[str, ...] | None = None) -> Candidate:
    """One answer token per sample, so that KL is the mean of `kl`."""
    rows = pd.DataFrame({"sample": [f"s{i}" for i in range(len(kl))], "answer_tokens": 1, "kl_sum": kl})
    return Candidate(name, frozenset((name,) if kept is None else kept), total_bytes, rows)


STANDARD = candidate("nothing kept", 100, 1.0, 1.2, 0.8, 1.0, kept=())


def test_ratio_and_its_error_by_hand():
    # values 1, 2 over counts 1, 3: ratio 3/4; residuals 1/4 and -1/4; se^2 = 2/1 * (2/16) / 4^2 = 1/64.
    assert ratio_se([1.0, 2.0], [1, 3]) == sqrt(1 / 64)
    assert isnan(ratio_se([1.0], [3]))


def test_differences_are_paired_by_sample_not_by_row():
    a, b = candidate("a", 1, 3.0, 5.0), candidate("b", 1, 2.0, 4.0)
    swapped = Candidate("b", b.kept, 1, b.measured.iloc[::-1])
    assert difference(a, swapped) == (1.0, 0.0)


def test_the_lowest_measured_kl_wins_whatever_the_scores_proposed():
    better, worse = candidate("b", 120, 0.1, 0.1, 0.12, 0.1), candidate("w", 110, 0.5, 0.5, 0.5, 0.52)
    found = decide([worse, better], STANDARD)
    assert found.chosen is better and found.best is better and found.tied == ()
    assert found.why == "b measured lowest, and no other list comes within its error."


def test_of_lists_that_cannot_be_told_apart_the_smallest_is_taken():
    # The gap is 0.01 +- 0.02 by sample: (0.05, 0.01, -0.03, 0.01)
    best = candidate("large", 130, 0.10, 0.10, 0.10, 0.10)
    small = candidate("small", 110, 0.15, 0.11, 0.07, 0.11)
    found = decide([best, small], STANDARD)
    assert found.best is best and found.chosen is small and found.tied == (small,)
    assert found.why == (
        "The lists small, large cannot be told apart within the error; "
        "of the smallest, small measured lowest."
    )


def test_sizes_that_differ_by_chance_do_not_decide():
    # Both cannot be told apart; 4 bytes of 1,000 are no difference in size, 60 are.
    standard = candidate("nothing kept", 1000, 1.0, 1.2, 0.8, 1.0, kept=())
    best = candidate("best", 1100, 0.10, 0.10, 0.10, 0.10)
    near, small = (candidate(name, size, 0.15, 0.11, 0.07, 0.11) for name, size in (("n", 1096), ("s", 1040)))
    assert decide([best, near], standard).chosen is best
    assert decide([best, small], standard).chosen is small


def test_one_list_under_two_names_is_no_tie():
    one, same = candidate("a", 110, 0.1, 0.1, 0.1, 0.2), candidate("b", 110, 0.1, 0.1, 0.1, 0.2, kept=("a",))
    assert decide([one, same], STANDARD).why == "a measured lowest, and no other list comes within its error."


def test_nothing_is_kept_where_nothing_measured_better():
    found = decide([candidate("a", 110, 1.0, 1.2, 0.8, 1.1)], STANDARD)
    assert found.chosen is STANDARD and "nothing is kept" in found.why


def test_a_list_that_measured_worse_than_nothing_is_never_taken_even_if_smaller():
    # Both are within the error of the best, but "worse" measured above standard 4-bit.
    best, worse = candidate("best", 130, 0.9, 1.3, 0.7, 1.0), candidate("worse", 90, 1.4, 0.9, 0.9, 0.9)
    assert decide([best, worse], STANDARD).chosen is STANDARD


def test_the_verdict_counts_one_layer_as_one_layer():
    one, two = (
        candidate("a", 110, 0.1, 0.1, 0.1, 0.2),
        candidate("b", 120, 0.1, 0.1, 0.1, 0.2, kept=("x", "y")),
    )
    assert "keeping 1 layer in 16-bit (+10.0%, 0.00 MiB)" in verdict(STANDARD, one, 100)
    assert "keeping 2 layers in 16-bit (+20.0%, 0.00 MiB)" in verdict(STANDARD, two, 100)


def test_the_verdict_says_when_a_gain_is_within_its_error():
    sure, unsure = candidate("a", 110, 0.1, 0.3, 0.0, 0.1), candidate("b", 110, 0.1, 2.2, 0.5, 0.9)
    assert "within its error" not in verdict(STANDARD, sure, 100)
    assert verdict(STANDARD, unsure, 100).endswith("less, a difference within twice its error.")
    assert "no list within the budget measured better" in verdict(STANDARD, STANDARD, 100)


def test_the_verdict_says_when_samples_are_too_few_for_its_errors():
    # P(|t| > 2) is 10.2 % for 6 samples, with 5 degrees of freedom, and 9.2 % for 7; one has no error.
    said = [verdict(x := candidate("nothing kept", 100, *range(n), kept=()), x, 100) for n in range(1, 9)]
    warned = [f", on {n} held-out samples, too few to trust" in text for n, text in enumerate(said, 1)]
    assert warned == [False, True, True, True, True, True, False, False] and "error unknown" in said[0]
    assert sum("too few" in text for text in said) == 5


def test_calibrated_weights_that_measure_worse_than_nearest_ones_are_named_as_such():
    # Against 1.0, 1.2, 0.8, 1.0: 0.5 more on every sample; 0.125 more on average, on one sample alone; less.
    worse = candidate("nothing kept", 100, 1.5, 1.7, 1.3, 1.5, kept=())
    unsure = candidate("nothing kept", 100, 1.5, 1.2, 0.8, 1.0, kept=())
    better = candidate("nothing kept", 100, 0.5, 1.2, 0.8, 1.0, kept=())
    said = calibration_verdict(worse, STANDARD, "nf4")
    assert said.startswith("Calibration does not pay here: on the held-out samples it leaves 0.5")
    assert "Scan with --format nf4, or" in said and "within twice its error" not in said
    assert "0.12 ± 0.12 more" in calibration_verdict(unsure, STANDARD, "nf4")
    assert "a difference within twice its error" in calibration_verdict(unsure, STANDARD, "nf4")
    assert calibration_verdict(better, STANDARD, "nf4") == ""


def test_the_verdict_on_a_bound_names_it():
    kept = candidate("a", 110, 0.1, 0.3, 0.0, 0.1)
    assert ", within the 0.2 asked for, " in verdict(STANDARD, kept, 100, 0.2)
    assert verdict(STANDARD, STANDARD, 100, 2.0).endswith(", within the 2.0 asked for; nothing is kept.")


def test_candidates_are_compared_where_the_kl_of_all_is_finite():
    a, b = candidate("a", 1, 1.0, nan, 3.0, inf), candidate("b", 1, 5.0, 6.0, 7.0, 8.0)
    first, second = on_common_samples([a, b])
    assert first.measured["sample"].tolist() == second.measured["sample"].tolist() == ["s0", "s2"]
    assert (first.kl, second.kl) == (2.0, 6.0)
    assert on_common_samples([]) == []


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.00632, 0.00041, "0.00632 ± 0.00041"),
        (1.2345, 0.12, "1.23 ± 0.12"),
        (12.0, nan, "12 (error unknown)"),
        (0.5, 0.0, "0.5 ± 0"),
    ],
)
def test_values_have_the_digits_that_their_errors_leave(value: float, error: float, shown: str):
    assert with_error(value, error) == shown


def test_a_share_is_told_in_points_also_where_its_error_is_unknown():
    assert difference_text(0.5, None, True, None) == "+50 points (error unknown)"
    assert difference_text(-0.25, None, False, None) == "-0.25 (error unknown)"
    assert difference_text(0.042, 0.011, True, True) == "+4.2 ± 1.1 points"
    assert mean_text(0.982, True) == "98.2 %" and mean_text(None, True) == "-"


def test_sums_that_miss_the_damage_are_said_with_the_reason():
    assert residual_verdict(-0.004) == "The sensitivities add up to the damage within 0.4%."
    assert not is_bent(None) and not is_bent(0.05) and is_bent(-0.051)
    said = residual_verdict(1.13)
    assert "miss the damage by +113.0%" in said and "share weights" in said and "Isolated KL" in said
