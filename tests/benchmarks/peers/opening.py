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

from qprobe.demo.folder import demo_folder
from qprobe.demo.outliers import outliers_folder
from qprobe.loading.reference import Reference, load_reference
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec
from tests.benchmarks.hardware import made_with
from tests.benchmarks.models import smollm2_folder
from tests.benchmarks.peers.judging import Judge
from tests.benchmarks.peers.passages import (
    Passages,
    batches_of,
    choose_passages,
    choose_scenes,
    inputs_of,
    read_passages,
)
from tests.benchmarks.peers.running import Machine
from tests.benchmarks.peers.workers.exchange import has_images


@dataclass(frozen=True)
class Opened:
    """model: its name; work: a folder that lives as long as the command, with the workers' files."""

    model: str
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
    parser.add_argument("--model", help=SCENES)
    parser.add_argument("--samples", type=int, default=128, help="calibration passages or scenes")
    parser.add_argument("--judged", type=int, default=48, help="passages of other topics, or other scenes")
    parser.add_argument("--others", type=int, default=32, help="passages of each other kind, of SmolLM2")
    parser.add_argument("--passages", type=Path, help="those that another run wrote")
    parser.add_argument("--limit", type=float, default=3600, help="seconds per peer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("reports/peers"))


SCENES = "demo, demo-outliers or a folder of tests.benchmarks.backbone, on scenes; SmolLM2 by default"


@contextmanager
def opened(options: Any) -> Iterator[Opened]:
    """Everything measured against, while the model walks in float32."""
    torch.set_num_threads(options.threads)
    folder = folder_of(options.model)
    subject = subject_of(reference_of(folder, options.device), FormatSpec())
    passages = read_passages(options.passages) if options.passages else chosen(options, subject)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, walking(subject.path):
        judge = Judge(subject, {kind: batches_of(subject, x) for kind, x in passages.judged.items()})
        machine = Machine(dict(options.python), options.device, options.threads, options.limit)
        found = Opened(
            options.model or folder.name, subject, judge, machine, made_with(options.device), Path(name)
        )
        passages.write(found.passages)
        torch.save(inputs_of(subject, passages.calibration), found.work / "inputs.pt")
        found.task.write_text(json.dumps({"model": str(folder), "inputs": str(found.work / "inputs.pt")}))
        yield found


def folder_of(model: str | None) -> Path:
    """The checkpoint of `--model`."""
    if model is None:
        return smollm2_folder()
    return {"demo": demo_folder, "demo-outliers": outliers_folder}.get(model, lambda: Path(model))()


def reference_of(folder: Path, device: str) -> Reference:
    """The model in `folder`; one of text reads passages as they are, without a chat template."""
    reference = load_reference(str(folder), device)
    if not has_images(folder):
        reference.processor.chat_template = None
    return reference


def chosen(options: Any, subject: Subject) -> Passages:
    """The samples that suit the model."""
    if options.model is None:
        return choose_passages(subject.reference.processor, options.samples, options.judged, options.others)
    return choose_scenes(options.samples, options.judged)


def begun(path: Path, opened: Opened) -> dict[str, Any]:
    """What earlier commands found, so that peers may be run one after another."""
    found = json.loads(path.read_text()) if path.is_file() else {"rows": [], "missing": {}}
    known = {"model": opened.model, "machine": opened.made_with, "tokens": opened.judge.tokens}
    return {**found, **known}


def _named_python(text: str) -> tuple[str, Path]:
    tool, _, path = text.partition("=")
    return tool, Path(path)
