"""What both commands share: their options, the model, the passages, and the judge of all weights."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec
from tests.benchmarks.hardware import made_with
from tests.benchmarks.models import smollm2_folder
from tests.benchmarks.peers.judging import Judge
from tests.benchmarks.peers.passages import batches_of, choose_passages, read_passages, token_rows
from tests.benchmarks.peers.running import Machine


@dataclass(frozen=True)
class Opened:
    """work: a folder that lives as long as the command; passages, task: files in it, for the workers."""

    subject: Subject
    judge: Judge
    machine: Machine
    made_with: str
    work: Path

    @property
    def passages(self) -> Path:
        return self.work / "passages.json"

    @property
    def task(self) -> Path:
        return self.work / "task.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that both commands have."""
    parser.add_argument("--python", nargs="+", type=_named_python, default=[], metavar="TOOL=PATH")
    parser.add_argument("--samples", type=int, default=128, help="calibration passages")
    parser.add_argument("--judged", type=int, default=48, help="passages of other topics")
    parser.add_argument("--others", type=int, default=32, help="passages of each other kind")
    parser.add_argument("--passages", type=Path, help="those that another run wrote")
    parser.add_argument("--limit", type=float, default=3600, help="seconds per peer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("reports/peers"))


@contextmanager
def opened(options: Any) -> Iterator[Opened]:
    """Everything measured against, while the model walks in float32."""
    torch.set_num_threads(options.threads)
    folder = smollm2_folder()
    reference = load_reference(str(folder), options.device)
    reference.processor.chat_template = None  # plain text
    subject = subject_of(reference, FormatSpec())
    passages = (
        read_passages(options.passages)
        if options.passages
        else choose_passages(reference.processor, options.samples, options.judged, options.others)
    )
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, walking(subject.path):
        judge = Judge(subject, {kind: batches_of(subject, x) for kind, x in passages.judged.items()})
        machine = Machine(dict(options.python), options.device, options.threads, options.limit)
        found = Opened(subject, judge, machine, made_with(options.device), Path(name))
        passages.write(found.passages)
        rows = token_rows(batches_of(subject, passages.calibration))
        found.task.write_text(json.dumps({"model": str(folder), "rows": rows}))
        yield found


def begun(path: Path, opened: Opened) -> dict[str, Any]:
    """What earlier commands found, so that peers may be run one after another."""
    found = json.loads(path.read_text()) if path.is_file() else {"rows": [], "missing": {}}
    return {**found, "machine": opened.made_with, "tokens": opened.judge.tokens}


def _named_python(text: str) -> tuple[str, Path]:
    tool, _, path = text.partition("=")
    return tool, Path(path)
