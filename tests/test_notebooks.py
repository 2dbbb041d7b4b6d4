"""The notebooks run, and what they show was made by running them from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks import FOLDER, executed

BOOKS = sorted(FOLDER.glob("*.ipynb"))
# What the notebooks do, in the same order, on fewer samples and in fewer steps, with one pixel for a picture,
# which takes as long to draw as such a scan. One kernel runs them all, and keeps no name of one for the next.
QUICKER = """
%reset -f
import io

import PIL.Image
import qprobe
import qprobe.report.write
import transformers
from tests.emulation import compute_bf16_by_float32


def on_few(work, **more):
    return lambda *given, samples, **asked: work(*given, samples=min(samples, 4), **{**more, **asked})


def in_few(arguments):
    return lambda *given, max_steps, **asked: arguments(*given, max_steps=min(max_steps, 4), **asked)


def pixel():
    file = io.BytesIO()
    PIL.Image.new("L", (1, 1)).save(file, "png")
    return file.getvalue()


compute_bf16_by_float32()
qprobe.report.write._pictures = lambda *_, png=pixel(): {"spikes.png": png}
qprobe.scan, qprobe.compare = on_few(qprobe.scan, nodes=1), on_few(qprobe.compare)
transformers.TrainingArguments = in_few(transformers.TrainingArguments)
"""


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_the_stored_outputs_are_of_one_run_from_top_to_bottom(path: Path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert all(x.output_type != "error" and x.get("name") != "stderr" for c in cells for x in c.outputs)


@pytest.fixture(scope="module")
def run() -> dict[Path, nbformat.NotebookNode]:
    """The notebooks with what they show on fewer samples."""
    return dict(zip(BOOKS, executed(dict.fromkeys(BOOKS, QUICKER)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # of the Jupyter packages; a failing cell raises
def test_it_runs_and_shows_what_the_stored_one_shows(path: Path, run: dict[Path, nbformat.NotebookNode]):
    fresh, stored = code_cells(run[path]), code_cells(nbformat.read(path, as_version=4))
    assert [kinds(cell) for cell in fresh] == [kinds(cell) for cell in stored]


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What kinds of output a cell has; its numbers depend on the processor."""
    return {x.output_type for x in cell.outputs}
