"""Which samples a command uses: the user's own, or the built-in ones that suit the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from qprobe.data.builtin import (
    DEFAULT_PROMPT,
    PHOTOGRAPHS,
    QUESTIONS,
    Samples,
    photographs,
    questions,
)
from qprobe.data.conversation import Conversation
from qprobe.data.images import decode, file_bytes, rule_notes
from qprobe.data.reading import (
    Reading,
    are_too_many,
    check_counts,
    check_left_out,
    read_conversations,
    share_left_out,
    share_sentence,
    warn_left_out,
)
from qprobe.data.reasons import Refused, shown
from qprobe.data.rows import Asked
from qprobe.data.source import source_of
from qprobe.data.turns import samples_of
from qprobe.errors import SampleError
from qprobe.options import BadData, Progress, SampleOptions, Turns, data_of, no_progress, path_if_given
from qprobe.records import Sample, Turn, asked
from qprobe.system.wording import counted

IMAGES = "Put PNG or JPEG files there."
DEMO_MODELS = ("demo", "demo-outliers")
SCENES = "qprobe.demo.scenes"  # by name: they are drawn with torch, which this room does without
# Defaults: the demo's KL is small and heavy-tailed, so that 48 scenes leave an error of half its size;
# 32 images a user has at hand.
SCAN_SAMPLES = {"demo": 192, "given": 32}
SEEDS = (
    1000  # of built-in scenes: those of a scan begin at 1000, held-out ones at 2000, so more would overlap
)
Refusal = Callable[[Sample], str | None]
"""Why the model cannot read a sample, a clause without a full stop; None if it can."""


def reads_all(_sample: Sample) -> None:
    """The `Refusal` of a model that reads anything."""


@dataclass(frozen=True)
class Wanted:
    """What the user said about samples; neither images nor data for the built-in ones."""

    images: Path | None = None
    data: Any = None
    prompt: str | None = None
    count: int | None = None
    seed: int = 0
    turns: Turns = "each"
    split: str | None = None
    bad_data: BadData = "refuse"
    allow_downloads: bool = False


def wanted_by(options: SampleOptions) -> Wanted:
    """What `options` say about samples."""
    return Wanted(
        images=path_if_given(options.images),
        data=data_of(options.data),
        prompt=options.prompt,
        count=options.samples,
        seed=options.seed,
        turns=options.turns,
        split=options.split,
        bad_data=options.bad_data,
        allow_downloads=options.allow_downloads,
    )


def check_wanted(model_id: str, wanted: Wanted) -> None:
    """Raises SampleError for samples that cannot be had, as far as that shows without reading any."""
    if wanted.images is not None and wanted.data is not None:
        raise SampleError("Both --images and --data are given. Pass one of them.")
    if wanted.count is not None and wanted.count < 1:
        raise SampleError(f"--samples {wanted.count} asks for no sample. Pass 1 or more.")
    if wanted.images is not None:
        image_files(wanted.images)
    elif wanted.data is not None:
        source_of(wanted.data)
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
    model_id: str,
    reads_images: bool,
    wanted: Wanted,
    purpose: Literal["scan", "compare"],
    refusal: Refusal = reads_all,
    progress: Progress = no_progress,
) -> Samples:
    """The samples of a scan, or held-out ones to compare on.

    Built-in samples of the two purposes never overlap; the user's own are used as given. One that cannot be
    used makes way for a later one, and is warned of.
    Raises SampleError if none is usable, for a folder of images where the model reads text only, or for a
    seed that built-in scenes do not have.
    """
    check_wanted(model_id, wanted)
    if wanted.images is not None and not reads_images:
        raise SampleError(
            f"--images {wanted.images} does not apply, since {model_id} reads text only. Pass --data with "
            "rows without an image, or leave it out for the built-in questions."
        )
    limit = scan_count(model_id, wanted)
    if wanted.images is not None:
        return _warned(from_folder(wanted.images, wanted, limit, refusal))
    if wanted.data is not None:
        return _warned(from_data(wanted, limit, refusal, progress))
    if model_id in DEMO_MODELS:
        return _readable(_scenes(limit, wanted.seed, purpose), limit, refusal, wanted.bad_data)
    builtin, total = (photographs, len(PHOTOGRAPHS)) if reads_images else (questions, len(QUESTIONS))
    first_held_out = total * 2 // 3
    part = (0, first_held_out) if purpose == "scan" else (first_held_out, total)
    found = builtin(wanted.prompt, part[1] - part[0], part[0])
    return _readable(found, limit, refusal, wanted.bad_data)


def _warned(found: Samples) -> Samples:
    """`found`; warns where rows were left out, since a Python user may never look at the notes."""
    warn_left_out(found.share, found.left_out)
    return found


def _scenes(count: int, seed: int, purpose: Literal["scan", "compare"]) -> Samples:
    drawn: Any = import_module(SCENES)

    first = drawn.CALIBRATION_SEED if purpose == "scan" else drawn.HELD_OUT_SEED
    return Samples(tuple(drawn.scenes(count, first + seed)))


def _readable(found: Samples, limit: int, refusal: Refusal, bad_data: BadData) -> Samples:
    """The first `limit` built-in samples that the model can read."""
    kept: list[Sample] = []
    told: list[str] = []
    for sample in found.samples:
        why = refusal(sample)
        if why is None:
            kept.append(sample)
        else:
            told.append(f"{shown(sample.id)}: left out, {why}.")
        if len(kept) >= limit:
            break
    advice = "Pass others with --images or --data."
    check_counts("the built-in samples", "sample", len(kept), told, bad_data, "measure", advice)
    return Samples(tuple(kept), tuple(told))


def from_data(
    wanted: Wanted, limit: int, refusal: Refusal = reads_all, progress: Progress = no_progress
) -> Samples:
    """At most `limit` samples of the user's data; a note for each row that was left out, always as a whole.

    Raises SampleError if the data cannot be read, or `check_left_out` does.
    """
    samples: list[Sample] = []

    def use(one: Conversation) -> None:
        made = samples_of(one, wanted.turns)
        why = next(filter(None, map(refusal, made)), None)
        if why is not None:
            raise Refused(why)
        samples.extend(made)

    def enough(skipped: int) -> bool:
        return len(samples) >= limit or are_too_many(limit, skipped, wanted.bad_data)

    how = Reading(wanted.split, wanted.allow_downloads, Asked(wanted.prompt, describe=True))
    found = read_conversations(wanted.data, how, use, enough, progress)
    check_left_out(found, wanted.bad_data, "measure")
    told = found.sentences()
    return Samples(tuple(samples[:limit]), told, found.notes, share_left_out(found))


def unanswered_note(samples: Sequence[Sample], wanted: Wanted) -> tuple[str, ...]:
    """A sentence where the model writes answers that the user's data does not bring."""
    count = sum(x.answer is None for x in samples)
    if wanted.data is None or not count:
        return ()
    if count == len(samples):
        return (f"No row brings an answer; the model wrote all {count:,}.",)
    return (f"{count:,} of {counted(len(samples), 'sample')} bring no answer; the model wrote them.",)


def from_folder(
    folder: Path, wanted: Wanted, limit: int | None = None, refusal: Refusal = reads_all
) -> Samples:
    """One sample for each image file of `folder` (not its subfolders), in name order, at most `limit`.

    Raises SampleError if the folder is missing, empty, or `check_counts` does.
    """
    found: list[Sample] = []
    skipped: list[str] = []
    rules: Counter[str] = Counter()
    files = image_files(folder)
    for path in files:
        full = limit is not None and len(found) >= limit
        if full or (limit is not None and are_too_many(limit, len(skipped), wanted.bad_data)):
            break
        try:
            data = file_bytes(path)
            decoded = decode(data)
        except Refused as problem:
            skipped.append(f"{shown(path.name)}: left out, it {problem}.")
            continue
        sample = Sample(path.name, asked(wanted.prompt or DEFAULT_PROMPT, data))
        why = refusal(sample)
        if why is None:
            found.append(sample)
            rules.update(decoded.rules)
        else:
            skipped.append(f"{shown(path.name)}: left out, {why}.")
    is_whole = len(found) + len(skipped) == len(files)
    check_counts(folder.name, "file", len(found), skipped, wanted.bad_data, "measure", IMAGES, is_whole)
    share = share_sentence(skipped, len(found), "file", folder.name, is_whole)
    return Samples(tuple(found), tuple(skipped), rule_notes(rules), share)


def image_files(folder: Path) -> list[Path]:
    """The files of `folder` that may be images, in name order; SampleError if there is no folder or file."""
    if folder.exists() and not folder.is_dir():
        raise SampleError(
            f"{folder} is a file, and --images takes a folder of images. Pass its folder, or a .jsonl file "
            f"with --data."
        )
    if not folder.is_dir():
        raise SampleError(f"Image folder {folder} does not exist. Pass a folder of image files to --images.")
    found = [p for p in folder.iterdir() if not p.name.startswith(".")]
    files = sorted(p for p in found if not p.is_dir())  # a pipe too, so that it is named
    if not files:
        state = "holds folders, and no image beside them" if found else "is empty"
        raise SampleError(f"Image folder {folder} {state}. {IMAGES}")
    return files


def scan_count(model_id: str, wanted: Wanted) -> int:
    """How many samples a scan measures or holds out."""
    is_builtin = wanted.images is None and wanted.data is None
    default = SCAN_SAMPLES["demo" if is_builtin and model_id in DEMO_MODELS else "given"]
    return wanted.count or default


def independent_of(samples: tuple[Sample, ...], held_out: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """Those of `samples` that do not begin as one of `held_out` does."""
    held = {_beginning(sample) for sample in held_out}
    return tuple(sample for sample in samples if _beginning(sample) not in held)


def split_held_out(samples: tuple[Sample, ...]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """(calibration, held out): every third sample is held out for the selection of the skip-list.

    Samples that begin alike are on one side together, as those of one conversation do, however often a row
    repeats it. With fewer than three different ones there is nothing to hold out, and
    the second part is empty.
    """
    beginnings = [_beginning(sample) for sample in samples]
    order = {x: i for i, x in enumerate(dict.fromkeys(beginnings))}
    is_held_out = [order[x] % 3 == 2 for x in beginnings]
    return (
        tuple(s for s, held in zip(samples, is_held_out, strict=True) if not held),
        tuple(s for s, held in zip(samples, is_held_out, strict=True) if held),
    )


def _beginning(sample: Sample) -> tuple[tuple[Turn, ...], str]:
    """What samples on one side share: all up to the first question, and its answer where there is no image.

    A text alone would not do: where every row asks the same, all would be on one side.
    """
    first = next(i for i, turn in enumerate(sample.turns) if turn.role == "user")
    begun, later = sample.turns[: first + 1], sample.turns[first + 1 :]
    answer = later[0].text if later else sample.answer or ""
    has_image = any(turn.seen for turn in begun)
    return tuple(Turn(turn.role, turn.parts) for turn in begun), "" if has_image else answer.strip()
