"""How often a whole scan decodes an image, runs the processor on it, and takes its digest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import pytest

import qprobe.scanning.finish
import qprobe.scanning.samples
import qprobe.scanning.scan as road
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from qprobe.records import Sample
from tests import tiny
from tests.scanning.asked import TinyFolder, options, scan

# What goes on below a function of the scan, by its name; the innermost counts.
STAGES = {
    "choose_samples": "reading",  # each image is checked before the model is asked anything
    "prepare_samples": "answers",
    "open_units": "measuring",
    "show_samples": "report",
    "measure_units": "measuring",
    "choose": "choosing",
}
CALIBRATION, HELD_OUT = 4, 2  # of six images


class Counts(NamedTuple):
    """How often, by stage and content, each image was decoded and processed, and each sample digested."""

    decodes: Counter[tuple[str, bytes]]
    processed: Counter[tuple[str, bytes]]
    digests: Counter[tuple[str, bytes]]

    def most(self) -> list[int]:
        return [max(x.values()) for x in self]

    def images(self, kind: str) -> Counter[str]:
        """How many images, by stage."""
        return Counter(stage for stage, _ in getattr(self, kind))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are going on, the innermost last."""
    entered = ["elsewhere"]

    def within(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            entered.append(stage)
            try:
                return function(*given, **named)
            finally:
                entered.pop()

        return run

    for module in (road, qprobe.scanning.samples, qprobe.scanning.finish):
        for name in STAGES.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, within(STAGES[name], getattr(module, name)))
    # Run for its answer as soon as a sample is read.
    monkeypatch.setattr(ProcessedSamples, "refusal", within("answers", ProcessedSamples.refusal))
    return entered


@pytest.fixture
def counts(stages: list[str], tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch) -> Counts:
    """What is counted from here on of scans of "qwen2_vl"."""
    found = Counts(Counter(), Counter(), Counter())
    opened, read = PIL.Image.open, Sample._read
    processor = type(load_processor(resolve(str(tiny_folder("qwen2_vl")))).image_processor)
    process = processor.__call__

    def counted_open(file: Any, *more: Any, **named: Any) -> Any:
        found.decodes[stages[-1], file.getvalue()] += 1
        return opened(file, *more, **named)

    def counted_process(self: Any, images: Any, *more: Any, **named: Any) -> Any:
        (image,) = images[0] if isinstance(images[0], list) else images
        found.processed[stages[-1], image.tobytes()] += 1
        return process(self, images, *more, **named)

    def counted_read(sample: Sample) -> Any:
        found.digests[stages[-1], sample.images[0] + (sample.answer or "").encode()] += 1
        return read(sample)

    monkeypatch.setattr(PIL.Image, "open", counted_open)
    monkeypatch.setattr(processor, "__call__", counted_process)
    monkeypatch.setattr(Sample, "_read", counted_read)
    return found


@pytest.mark.slow
def test_each_image_is_decoded_processed_and_digested_at_most_once_per_stage(
    counts: Counts, tiny_folder: TinyFolder, tmp_path: Path
):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(CALIBRATION + HELD_OUT):
        (images / f"{number}.png").write_bytes(tiny.picture(number))
    scan(**options(tiny_folder("qwen2_vl"), tmp_path / "run", images=images, measures=("sensitivity",)))
    assert counts.most() == [1, 1, 1]
    processed = {"answers": CALIBRATION + HELD_OUT, "measuring": CALIBRATION, "choosing": HELD_OUT}
    assert counts.images("processed") == processed
    # Beside those for the processor, one to see that it can be read, and one for the thumbnail.
    assert counts.images("decodes") == {
        **processed,
        "reading": CALIBRATION + HELD_OUT,
        "report": CALIBRATION,
    }
    # Without and with the answer that the model gave.
    assert sum(counts.images("digests").values()) == 2 * (CALIBRATION + HELD_OUT)
