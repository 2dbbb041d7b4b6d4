"""Which lists are compared on held-out samples."""

from __future__ import annotations

import pandas as pd
import pytest

from qprobe.registry import measures
from qprobe.selection.budget import Budget
from qprobe.selection.candidates import candidates
from qprobe.selection.request import parse_request
from qprobe.selection.scores import ScoredRun
from tests.runs.runs import inventory_of, linear, scan_of

NAMES = tuple(f"l{i}" for i in range(7))
DAMAGE = (0.05, 0.03, 0.02, 0.02, 3e-5, 6e-5, 5e-5)  # four layers hold it, the others fill the limit


def scored(damage: tuple[float, ...], path: bool = True) -> ScoredRun:
    """A run of seven equal layers, without sensitivities unless `path`."""
    nothing = dict.fromkeys(measures.proposing(), float("nan"))
    own = {"weight_nmse": list(damage)}
    if path:
        own |= {"sensitivity_kl": [3 * x for x in damage], "isolated_kl": list(damage)}
    columns = {x.name: float("nan") for x in measures.columns()}
    table = pd.DataFrame({"layer": NAMES, **{**columns, **nothing}, **own})
    return ScoredRun(scan_of(inventory_of(*map(linear, NAMES))), table)


def everything(run: ScoredRun) -> Budget:
    return Budget("all", run.inventory.total_bytes(frozenset(NAMES)))


@pytest.mark.parametrize(("by", "path"), [("sensitivity_kl", True), ("weight_nmse", False)])
def test_the_list_that_chooses_is_compared_with_itself_without_what_only_fills_the_limit(by: str, path: bool):
    run = scored(DAMAGE, path)
    found = candidates(run, parse_request(), everything(run))
    assert found[f"by {by}"].kept == NAMES
    assert found[f"by {by}, trimmed"].kept == NAMES[:4]
    assert found[f"by {by}, half trimmed"].kept == (*NAMES[:4], "l5")  # of three the one that returns most
    assert sum("trimmed" in name for name in found) == 2


def test_a_list_of_which_every_layer_counts_is_compared_with_no_smaller_one():
    run = scored((0.05, 0.03, 0.02, 0.02, 0.02, 0.03, 0.04))
    assert not any("trimmed" in name for name in candidates(run, parse_request(), everything(run)))


def test_what_is_as_large_as_the_list_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    # Three layers of seven are 16-bit more than 4-bit allows for one size here.
    monkeypatch.setattr("qprobe.selection.candidates.SAME_SIZE", 10.0)
    run = scored(DAMAGE)
    assert not any("trimmed" in name for name in candidates(run, parse_request(), everything(run)))
