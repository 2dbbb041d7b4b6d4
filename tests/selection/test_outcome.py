"""What is said of the list that measuring chose."""

from types import SimpleNamespace
from typing import Any

from qprobe.manifest.records import NOTHING
from qprobe.selection.budget import Budget
from qprobe.selection.outcome import CHOSEN_HERE, within_budget
from qprobe.selection.skiplist import SkipList
from tests.runs.runs import four_layers
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
