"""The road of one model: every command on it, in this process, and what each came to.

A command ends well, refuses in a sentence, or falls with a traceback. What it gives goes on to the oracles.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

import qprobe
from qprobe.scanning import finish
from tests import tiny

PROMPTS = (
    "what does the image show?",
    "which one is larger, the left bar or the right bar?",
    "name the colour and the number",
    "describe the picture in one sentence",
    "a cat, a rocket and a cup of coffee",
    "read the dial",
)
ANSWERS = (
    "a row of teeth",
    "the left bar is larger",
    "blue, forty two",
    "two lines cross",
    "the moon",
    "seven",
)
HELD_OUT = 2  # samples behind the others, on which a training is evaluated
OK, REFUSED, LATE, TRACEBACK, SKIPPED = "ok", "refused", "refused late", "traceback", "-"


@dataclass
class Course:
    """What a model's road has come to: `cells` by step, (state, sentence), and what the steps gave."""

    folder: Path
    work: Path
    data: Path
    cells: dict[str, tuple[str, str]] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    weights_read: bool = False

    def step(self, name: str, needs: tuple[str, ...], action: Callable[[], Any]) -> None:
        """Runs `action` as the step `name` if the steps in `needs` ended well."""
        if any(self.cells[x][0] != OK for x in needs):
            self.cells[name] = (SKIPPED, "")
            return
        self.weights_read = False
        try:
            with counting(self):
                self.given[name] = action()
        except qprobe.QprobeError as error:
            self.cells[name] = (LATE if self.weights_read else REFUSED, str(error))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)
            where = next((f"{Path(x.filename).name}:{x.lineno}" for x in reversed(place)), "")
            self.cells[name] = (TRACEBACK, f"{type(error).__name__}: {error} ({where})")
        else:
            self.cells[name] = (OK, "")


@contextmanager
def counting(course: Course) -> Iterator[None]:
    """Notes in `course` that transformers was asked for a model with its weights."""
    method: Any = PreTrainedModel.from_pretrained
    plain = method.__func__

    def noted(cls: type, *args: Any, **options: Any) -> Any:
        # Without data where qprobe asks what the files hold.
        course.weights_read |= "state_dict" not in options
        return plain(cls, *args, **options)

    no_pictures = mock.patch.object(finish, "write_report", lambda _folder: [])  # which have their own tests
    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(noted)), no_pictures:
        yield


def walk(folder: Path, work: Path, sees: bool) -> Course:
    """The course of the model in `folder`; `work` takes the run, the checkpoint, and the samples."""
    course = Course(folder, work, _samples(work, sees))
    given = course.given
    model = str(folder)
    course.step("plan", (), lambda: qprobe.plan(model))
    course.step(
        "scan weights",
        (),
        lambda: qprobe.scan(model, measures=["weight"], out=work / "weights", progress=_silent, device="cpu"),
    )
    course.step("scan", (), lambda: _scan(course))
    runs = next((x for x in ("scan", "scan weights") if course.cells[x][0] == OK), "scan")
    course.step("select", (runs,), lambda: qprobe.select(given[runs].path, budget="+30%"))

    def manifest() -> Path:
        return given[runs].path / "skiplist.json"

    course.step("load", (runs,), lambda: qprobe.load_dynamic_4bit(manifest(), model, "cpu")[0])
    course.step("verify", ("load",), lambda: qprobe.verify(given["load"], qprobe.read_manifest(manifest())))
    out = work / "four-bit"
    course.step("quantize", ("load",), lambda: qprobe.quantize(manifest(), out, model=model, device="cpu"))
    course.step("audit", ("quantize",), lambda: _audit(out, manifest()))
    course.step("reload", ("quantize",), lambda: qprobe.load_dynamic_4bit(out, device="cpu")[0])
    course.step(
        "compare",
        ("load", "scan"),
        lambda: qprobe.compare(
            manifest(), model=model, data=course.data, samples=2, max_new_tokens=4, device="cpu"
        ),
    )
    course.step("finetune", ("load",), lambda: _finetuned(course, manifest()))
    return course


def _scan(course: Course) -> Any:
    return qprobe.scan(
        str(course.folder),
        data=course.data,
        samples=len(PROMPTS),
        batch_size=1,  # no padding, so that an oracle that knows none computes the same
        device="cpu",
        budget="+30%",
        out=course.work / "run",
        progress=_silent,
    )


def _finetuned(course: Course, manifest: Path) -> tuple[Any, Any]:
    """(what a training of two steps gave, its adapter on its base again)."""
    train, held_out = course.work / "train.jsonl", course.work / "held-out.jsonl"
    lines = course.data.read_text().splitlines()
    train.write_text("\n".join(lines[:-HELD_OUT]))
    held_out.write_text("\n".join(lines[-HELD_OUT:]))
    done = qprobe.finetune(
        manifest,
        model=str(course.folder),
        data=train,
        eval_data=held_out,
        out=course.work / "adapter",
        steps=2,
        accumulation=1,
        rank=1,  # of a gate with one output, too
        device="cpu",
    )
    return done, qprobe.load_finetuned(done.out, device="cpu")[0]


def _audit(out: Path, manifest: Path) -> Any:
    found = qprobe.audit(out, manifest)
    assert found.ok, found.problems
    return found


def _samples(work: Path, sees: bool) -> Path:
    """A file of samples with answers, each with a picture where the model `sees`."""
    rows = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    if sees:
        for number, row in enumerate(rows):
            (work / f"{number}.png").write_bytes(tiny.picture(number))
            row["image"] = f"{number}.png"
    data = work / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    return data


def _silent(stage: str, done: int, total: int) -> None:
    pass


def seeded() -> None:
    """The same numbers wherever a step draws any."""
    torch.manual_seed(0)
