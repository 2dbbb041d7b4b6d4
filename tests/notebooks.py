"""The notebooks in notebooks/, executed: `python -m tests.notebooks` stores their outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
SECONDS = 300  # of one cell, on a busy machine


def executed(path: Path, first: str = "") -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel that imports this checkout.

    first: code that the kernel runs before it.

    What goes to stderr (progress, remarks of other packages) is left out: it names folders of the machine.
    Raises nbclient's CellExecutionError if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if first:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": FOLDER}},
        coalesce_streams=True,  # else how often a cell is flushed would show
    )
    client.execute(env=environment)
    del notebook.cells[: bool(first)]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ each time
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for book in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(executed(book), book)
