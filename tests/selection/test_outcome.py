"""What is said of the list that measuring chose."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qprobe.errors import BudgetError
from qprobe.manifest.records import NEAREST, NOTHING, Quality
from qprobe.records import FormatSpec
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import write_table
from qprobe.selection.bound import parse_bound
from qprobe.selection.budget import Budget
from qprobe.selection.candidates import nothing_kept
from qprobe.selection.decide import Candidate
from qprobe.selection.outcome import CHOSEN_HERE, Outcome, within_bound, within_budget
from qprobe.selection.request import parse_request
from qprobe.selection.scores import ScoredRun
from qprobe.selection.select import scored_run
from qprobe.selection.skiplist import SkipList
from tests.runs.runs import four_layers, inventory_of, linear, make_run, rows
from tests.selection.test_decide import STANDARD, candidate

RUN: Any = SimpleNamespace(
    standard_bytes=100, scan=SimpleNamespace(readout="answers"), inventory=four_layers()
)


def verdict_on(*kl: float) -> str:
    one = candidate("model.a", 120, *kl)
    skiplists = {NOTHING: SkipList((), 100, 0.0, "x"), "model.a": SkipList(("model.a",), 120, 0.0, "x")}
    return within_budget(RUN, Budget("+1B", 130), skiplists, [STANDARD, one]).verdict


def test_the_kl_of_a_list_that_won_is_said_to_be_of_the_samples_that_chose_it():
    assert verdict_on(0.1, 0.1, 0.12, 0.1).endswith(f"less. {CHOSEN_HERE}")
    assert CHOSEN_HERE not in verdict_on(5.0, 5.0, 5.0, 5.0)  # nothing is kept, so nothing was chosen


class ByHand:
    """Measures a list by what `kl_of` says of the layers it keeps, on four samples."""

    def __init__(self, kl_of: Callable[[int], float], nearest: Sequence[Candidate] = ()) -> None:
        self.kl_of, self.beside = kl_of, list(nearest)

    def measure(self, skiplists: Mapping[str, SkipList]) -> dict[str, Candidate]:
        return {
            name: candidate(name, x.total_bytes, *[self.kl_of(len(x.kept))] * 4, kept=x.kept)
            for name, x in skiplists.items()
        }

    def nearest(self, run: ScoredRun) -> list[Candidate]:
        return self.beside


@pytest.fixture
def ten(tmp_path: Path) -> ScoredRun:
    """Ten layers of one size with sensitivities 0.1, 0.2, ... 1.0, of which the last ones are kept first."""
    layers = inventory_of(*(linear(f"l{i}") for i in range(10)), linear("lm_head", fixed="lm_head"))
    shares = rows("sensitivity", *(("s", f"l{i}", 1, (i + 1) / 10) for i in range(10)))
    run = RunFolder(make_run(tmp_path / "run", layers, sensitivity=[shares]))
    write_table(run)
    return scored_run(run, parse_request(max_kl=1.0))


def bounded(run: ScoredRun, kl_of: Callable[[int], float], max_kl: float = 1.0) -> Outcome:
    held_out = ByHand(kl_of)
    standard = held_out.measure({NOTHING: nothing_kept(run, None)})[NOTHING]
    return within_bound(run, parse_bound(max_kl), standard, held_out)


def test_within_a_bound_the_smallest_list_that_measured_so_is_taken_with_its_proof(ten: ScoredRun):
    found = bounded(ten, lambda kept: (10 - kept) / 4)  # 6 layers leave 1.0
    assert found.skiplist.kept == ("l4", "l5", "l6", "l7", "l8", "l9")
    assert (found.budget.requested, found.budget.limit_bytes) == ("max-kl 1.0", found.skiplist.total_bytes)
    assert found.proof.quality == Quality(4, 2.5, 1.0, None)
    chosen = [x for x in found.proof.compared if x.chosen]
    assert len(chosen) == 1 and chosen[0].kl == 1.0 and chosen[0].total_bytes == found.skiplist.total_bytes
    assert found.proof.compared[0].name == NOTHING and len(found.candidates) == len(found.proof.compared) > 2
    assert "within the 1.0 asked for" in found.verdict and found.verdict.endswith(CHOSEN_HERE)


def test_where_keeping_nothing_is_within_the_bound_no_other_list_is_measured(ten: ScoredRun):
    found = bounded(ten, lambda kept: 1.0 if not kept else nan)
    assert found.skiplist.kept == () and len(found.candidates) == 1
    assert "within the 1.0 asked for; nothing is kept." in found.verdict and CHOSEN_HERE not in found.verdict


def test_a_bound_that_no_list_measures_within_says_what_would_do(ten: ScoredRun):
    most = ten.standard_bytes + 9 * 6076  # nine of the ten layers
    said = rf"the smallest of \d+ measured is 1\.2, with {most:,} bytes\. Pass --max-kl 1\.2 or more"
    with pytest.raises(BudgetError, match=said):
        bounded(ten, lambda kept: 3.0 - 0.2 * kept)


def test_what_standard_4_bit_costs_stands_beside_calibrated_weights_and_is_never_chosen(ten: ScoredRun):
    nearest = candidate(NEAREST, 100, 0.1, 0.1, 0.1, 0.1, kept=())
    calibrated = replace(ten, scan=replace(ten.scan, format=FormatSpec("nf4-calibrated")))
    held_out = ByHand(lambda kept: 0.5, [nearest])
    standard = held_out.measure({NOTHING: nothing_kept(ten, None)})[NOTHING]
    found = within_bound(calibrated, parse_bound(1.0), standard, held_out)
    assert found.proof.quality == Quality(4, 0.1, 0.5, None)
    assert [(x.name, x.chosen) for x in found.proof.compared] == [(NOTHING, True), (NEAREST, False)]
    assert "Calibration does not pay here" in found.verdict and "(standard 4-bit 0.1 ± 0)" in found.verdict


def test_lists_that_cannot_be_told_apart_are_noted_and_a_clear_winner_is_not():
    def notes(*kl: float) -> tuple[str, ...]:
        lists = {"large": ("model.a", "model.q"), "small": ("model.a",)}
        sizes = {"large": 130, "small": 120}
        skiplists = {name: SkipList(kept, sizes[name], 0.0, "x") for name, kept in lists.items()}
        skiplists |= {NOTHING: SkipList((), 100, 0.0, "x")}
        large = candidate("large", 130, 0.1, 0.1, 0.1, 0.1, kept=lists["large"])
        small = candidate("small", 120, *kl, kept=lists["small"])
        return within_budget(RUN, Budget("+1B", 130), skiplists, [STANDARD, large, small]).notes

    assert notes(0.5, 0.5, 0.5, 0.52) == ()
    (said,) = notes(0.15, 0.11, 0.07, 0.11)
    assert said.startswith("The lists small, large cannot be told apart within the error")
