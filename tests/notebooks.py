"""The notebooks in notebooks/, executed: `python -m tests.notebooks` stores their outputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
SECONDS = 300  # of one cell, on a busy machine


def executed(books: Mapping[Path, str]) -> list[nbformat.NotebookNode]:
    """The notebooks with the outputs of one fresh kernel that imports this checkout and runs them in turn.

    books: for each the code that the kernel runs before it, if any.

    What goes to stderr (progress, remarks of other packages) is left out: it names folders of the machine.
    Raises nbclient's CellExecutionError if a cell fails.
    """
    notebooks = [nbformat.read(path, as_version=4) for path in books]
    before = [[nbformat.v4.new_code_cell(code)] if code else [] for code in books.values()]
    cells = [cell for first, book in zip(before, notebooks, strict=True) for cell in (*first, *book.cells)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    joined = nbformat.v4.new_notebook()
    joined.cells = cells
    client = NotebookClient(
        joined,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": FOLDER}},
        coalesce_streams=True,  # else how often a cell is flushed would show
    )
    client.execute(env=environment)
    for cell in cells:
        cell.metadata.pop("execution", None)  # times, which differ each time
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    return notebooks


if __name__ == "__main__":
    for book in sorted(FOLDER.glob("*.ipynb")):
        (fresh,) = executed({book: ""})
        nbformat.write(fresh, book)
