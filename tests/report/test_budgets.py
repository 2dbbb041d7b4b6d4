"""The lists along the budget are those of `select`, with what it predicts and how sure that is."""

from __future__ import annotations

from math import fsum
from pathlib import Path

import pytest

from qprobe.report.budgets import Prediction, points
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import write_table
from qprobe.runs.statistics import ratio_se
from qprobe.selection.select import select
from tests.report.full_run import write_full_run
from tests.runs.runs import make_run, rows


@pytest.mark.slow
def test_every_point_is_the_list_that_select_gives_for_its_budget(tmp_path: Path):
    folder = write_full_run(tmp_path)
    found = points(RunFolder(folder), RunFolder(folder).scan, RunFolder(folder).table)
    assert found[0].skiplist.kept == () and len({p.skiplist.kept for p in found}) == len(found) > 10
    for point in found[:: len(found) // 4]:
        manifest = select(folder, point.budget.requested)
        assert set(manifest.skip_modules) == {*point.skiplist.kept, "lm_head"}
        assert point.predicted is not None and point.predicted.value == manifest.quality.kl_predicted
        assert point.skiplist.total_bytes == manifest.budget.total_bytes <= point.budget.limit_bytes
        measured = None if point.measured is None else point.measured.value
        assert measured == pytest.approx(manifest.quality.kl_dynamic)
    assert sum(p.measured is not None for p in found) >= 2


@pytest.mark.slow
def test_without_isolated_kl_the_error_is_that_of_the_summed_sensitivities(tmp_path: Path):
    folder = write_full_run(tmp_path)
    next((folder / "units").glob("isolated-*")).unlink()
    write_table(RunFolder(folder))
    scan, table = RunFolder(folder).scan, RunFolder(folder).table
    kept = frozenset(table["layer"][:20])
    units = RunFolder(folder).units("sensitivity")
    rest = units[~units["layer"].isin(kept)].groupby("sample")["kl_sum"].apply(fsum)
    found = Prediction(RunFolder(folder), scan, table).left_by(kept)
    assert found is not None and found.samples == 6
    assert found.value == pytest.approx(fsum(rest) / 30)  # 6 samples of 5 answer tokens
    assert found.error == pytest.approx(ratio_se(list(rest), [5] * 6))


def test_samples_without_isolated_kl_add_no_error(tmp_path: Path):
    # Every sample alike, isolated KL known of half of them: the sums do not vary, so the error is 0.
    sensitivity = [(f"s{i}", name, 5, 0.2) for i in range(6) for name in ("model.a", "model.b")]
    isolated = [(f"s{i}", name, 5, 0.1) for i in range(3) for name in ("model.a", "model.b")]
    run = make_run(
        tmp_path / "run",
        sensitivity=[rows("sensitivity", *sensitivity)],
        isolated=[rows("isolated", *isolated)],
    )
    write_table(RunFolder(run))
    found = Prediction(RunFolder(run), RunFolder(run).scan, RunFolder(run).table).left_by(
        frozenset(("model.a",))
    )
    # half of the damage left: 0.1 / 5 of its own, and 1/2 of (0.2 - 0.1) / 5 between both
    assert found is not None and found.value == pytest.approx(0.03)
    assert found.error == pytest.approx(0.0, abs=1e-12)
