"""Which samples a command uses: the user's own, or the built-in ones that suit the model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qprobe.data.sources import (
    PHOTOGRAPHS,
    Samples,
    check_file,
    from_folder,
    from_jsonl,
    image_files,
    photographs,
)
from qprobe.data.texts import QUESTIONS, questions
from qprobe.errors import SampleError
from qprobe.records import Sample

DEMO_MODELS = ("demo", "demo-outliers")
SCENES = "qprobe.demo.scenes"  # by name: they are drawn with torch, which this room does without
# Defaults: the demo's KL is small and heavy-tailed, so that 48 scenes leave an error of half its size;
# 32 images a user has at hand.
SCAN_SAMPLES = {"demo": 192, "given": 32}
SEEDS = (
    1000  # of built-in scenes: those of a scan begin at 1000, held-out ones at 2000, so more would overlap
)


class Wanted(NamedTuple):
    """What the user said about samples; all None for the built-in ones."""

    images: Path | None = None
    data: Path | None = None
    prompt: str | None = None
    count: int | None = None
    seed: int = 0


def check_wanted(model_id: str, wanted: Wanted) -> None:
    """Raises SampleError for samples that cannot be had, as far as that shows without reading any."""
    if wanted.images is not None and wanted.data is not None:
        raise SampleError("Both --images and --data are given. Pass one of them.")
    if wanted.count is not None and wanted.count < 1:
        raise SampleError(f"--samples {wanted.count} asks for no sample. Pass 1 or more.")
    if wanted.images is not None:
        image_files(wanted.images)
    elif wanted.data is not None:
        check_file(wanted.data)
    elif model_id in DEMO_MODELS and wanted.prompt is not None:
        raise SampleError(
            "--prompt does not apply to the built-in scenes, which bring their own questions and answers. "
            "Leave it out, or pass --images or --data."
        )
    elif model_id in DEMO_MODELS and not 0 <= wanted.seed < SEEDS:
        raise SampleError(
            f"--seed {wanted.seed} is out of range: built-in scenes have the seeds 0 to {SEEDS - 1}, so that "
            "those of a scan are never the held-out ones. Pass one of them."
        )


def choose_samples(
    model_id: str, reads_images: bool, wanted: Wanted, purpose: Literal["scan", "compare"]
) -> Samples:
    """The samples of a scan, or held-out ones to compare on.

    Built-in samples of the two purposes never overlap; the user's own are used as given.
    Raises SampleError if none is usable, or for a seed that built-in scenes do not have.
    """
    check_wanted(model_id, wanted)
    limit = wanted.count or SCAN_SAMPLES["given"]
    if wanted.images is not None:
        return from_folder(wanted.images, wanted.prompt, limit)
    if wanted.data is not None:
        return from_jsonl(wanted.data, wanted.prompt, limit)
    if model_id in DEMO_MODELS:
        return _scenes(wanted.count or SCAN_SAMPLES["demo"], wanted.seed, purpose)
    builtin, total = (photographs, len(PHOTOGRAPHS)) if reads_images else (questions, len(QUESTIONS))
    first_held_out = total * 2 // 3
    if purpose == "scan":
        return builtin(wanted.prompt, min(limit, first_held_out))
    return builtin(wanted.prompt, limit, first_held_out)


def _scenes(count: int, seed: int, purpose: Literal["scan", "compare"]) -> Samples:
    drawn: Any = import_module(SCENES)

    first = drawn.CALIBRATION_SEED if purpose == "scan" else drawn.HELD_OUT_SEED
    return Samples(tuple(drawn.scenes(count, first + seed)))


def split_held_out(samples: tuple[Sample, ...]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """(calibration, held out): every third sample is held out for the choice of the skip-list.

    Samples of the same image, prompt and answer are on one side together. With fewer than three different
    ones there is nothing to hold out, and the second part is empty.
    """
    order = {digest: i for i, digest in enumerate(dict.fromkeys(sample.digest for sample in samples))}
    is_held_out = [order[sample.digest] % 3 == 2 for sample in samples]
    return (
        tuple(s for s, held in zip(samples, is_held_out, strict=True) if not held),
        tuple(s for s, held in zip(samples, is_held_out, strict=True) if held),
    )
