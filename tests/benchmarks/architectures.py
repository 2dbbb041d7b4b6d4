"""Does the whole road hold for every architecture, and is what it says true?

    python -m tests.benchmarks.architectures [NAME ...] [--work DIR] [--report] [--jobs N] [--finished]

Tiny models with random weights of every kind that transformers loads are taken through plan, both scans,
select, load, verify, quantize, audit, reload, compare and finetune, and oracles with no rule in common with
qprobe compute a second time which modules are in 4-bit, weight and activation errors, KL, bytes, and the loss
of a training. Prints
architecture x step; exits with 1 where a step fell with a traceback, an oracle disagrees, or a refusal came
only after weights were read. A finished model is kept in --work and not made again: remove its file there to
do so. --report writes reports/architectures/README.md; with --finished of what --work holds, naming what it
lacks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.benchmarks.architecture_matrix.report import failures, table_line, write_report

REPORT = Path("reports/architectures")


def names() -> list[str]:
    """Every model, texts first."""
    from tests.benchmarks.architecture_matrix import images, texts

    return [*texts.recipes(), *images.recipes()]


def outcome(name: str) -> dict[str, Any]:
    """What the road of the model `name` came to: its class, cells by step, oracles, and seconds."""
    from qprobe.loading.log_filters import quiet_models
    from qprobe.loading.processor import load_processor
    from qprobe.loading.source import resolve
    from tests import tiny
    from tests.benchmarks.architecture_matrix import adapters, images, oracles, outputs, road, texts

    recipe = {**texts.recipes(), **images.recipes()}[name]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work, quiet_models():
        road.seeded()
        folder = tiny.write_recipe(recipe, name, Path(work) / "model")
        course = road.walk(folder, Path(work), images.reads_images(name))
        try:
            wrong = oracles.untrue(course)
            processor = load_processor(resolve(str(folder)))
            if course.cells["scan"][0] == road.OK:
                wrong |= outputs.untrue_outputs(course, processor)
            if course.cells["finetune"][0] == road.OK:
                wrong |= adapters.untrue_training(course, processor)
        except Exception:
            wrong = {"oracles": [traceback.format_exc(limit=-1)]}
    return {
        "name": name,
        "architecture": recipe.architecture,
        "cells": {step: [state, said.replace(work, "...")] for step, (state, said) in course.cells.items()},
        "oracles": wrong,
        "seconds": round(time.perf_counter() - start, 1),
    }


def outcome_path(name: str, work: Path) -> Path:
    """Where the outcome of the model `name` is kept."""
    return work / f"{name.replace(' ', '_').replace(',', '')}.json"


def kept_outcome(name: str, work: Path) -> dict[str, Any]:
    """`outcome`, from `work` if it lies there."""
    path = outcome_path(name, work)
    if path.is_file():
        return json.loads(path.read_text())
    found = outcome(name)
    path.write_text(json.dumps(found, indent=1))
    return found


def main(given: Sequence[str] | None = None) -> int:
    """0 if every cell is true, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models, by a part of their names; all")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qprobe-architectures")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT}/README.md")
    parser.add_argument("--jobs", type=int, default=1, help="models at once")
    parser.add_argument("--finished", action="store_true", help="run no model")
    asked = parser.parse_args(given)
    asked.work.mkdir(parents=True, exist_ok=True)
    every = names()
    chosen = [x for x in every if not asked.names or any(part in x for part in asked.names)]
    missing = [x for x in chosen if asked.finished and not outcome_path(x, asked.work).is_file()]
    chosen = [x for x in chosen if x not in missing]
    outcomes = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.jobs, mp_context=context, initializer=_quiet) as pool:
        waiting = [pool.submit(kept_outcome, name, asked.work) for name in chosen]
        for done in as_completed(waiting):
            found = done.result()
            outcomes[found["name"]] = found
            print(table_line(found), flush=True)
    ordered = [outcomes[name] for name in chosen]
    wrong = failures(ordered)
    for sentence in wrong:
        print(sentence)
    if asked.report:
        write_report(REPORT, ordered, wrong, missing)
    return 1 if wrong else 0


def _quiet() -> None:
    """One thread, no bars and no lines of other packages."""
    import gc
    import warnings

    import torch
    from transformers.utils import logging

    importlib.import_module("tests.benchmarks.architecture_matrix.outputs")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    gc.freeze()  # qprobe collects garbage between models, which takes a second with all these modules


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
