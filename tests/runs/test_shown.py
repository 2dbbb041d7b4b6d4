"""The samples that a page shows, as they are read back."""

from pathlib import Path
from typing import Any

import pytest

from qprobe.errors import RunError
from qprobe.models.grid import Grid
from qprobe.runs.folder import RunFolder
from qprobe.runs.shown import ShownSample, parse_shown, write_shown
from tests.runs.runs import make_run


def sample(name: str, grid: Any) -> ShownSample:
    return ShownSample(name, "what is it?", "a cat", None, None, ("a", None), grid)


def test_samples_are_read_back_as_they_were_with_the_grid_of_their_image(tmp_path: Path):
    run = RunFolder(make_run(tmp_path / "run"))
    given = [sample("a", Grid(2, 3, 4)), sample("b", None)]
    write_shown(run, given)
    assert list(RunFolder(run.path).samples.values()) == given
    assert "ä" not in (run.path / "samples.json").read_text("utf-8")
    write_shown(run, [sample("ä", None)])
    assert '"ä"' in (run.path / "samples.json").read_text("utf-8")


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_a_grid_that_counts_nothing_is_refused(wrong: Any, tmp_path: Path):
    run = RunFolder(make_run(tmp_path / "run"))
    write_shown(run, [sample("a", Grid(1, wrong, 4))])
    path = run.path / "samples.json"
    with pytest.raises(RunError, match=r"samples\.json is damaged"):
        parse_shown(path, path.read_bytes())
