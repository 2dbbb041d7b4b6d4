"""What measuring takes on a device, held against what scans took, and the batch that it is planned for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qprobe.calibration.planned.limit import shape_of_batch
from qprobe.calibration.planned.memory import BatchShape, device_need, weight_bytes
from qprobe.checkpoint.plan import planned_skeleton
from qprobe.data.images import png
from qprobe.inputs.answers import Batching
from qprobe.inputs.decoder import Decoder, Layout
from qprobe.inputs.processed import ProcessedSamples
from qprobe.records import FormatSpec, Sample, Turn, Video, asked
from tests import sequences, tiny
from tests.inputs.videos import video_processor

GIB = 2**30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "vision_rows", "measured_gib"),
    [("llama-3.2-11b-vision", 4 * 1601, 35.0), ("qwen3-30b-a3b", 0, 76.5)],  # reports/full-size
)
def test_device_memory_is_within_a_twentieth_of_what_full_size_scans_took(
    model: str, vision_rows: int, measured_gib: float
):
    shape = BatchShape(samples=4, tokens=320, answer_tokens=64, vision_rows=vision_rows)
    need = device_need(planned_skeleton(model, None), FormatSpec(), shape)
    assert 0.99 < need.total / GIB / measured_gib < 1.05


def test_weights_are_counted_in_all_forms_that_are_held():
    # SmolVLM's path is walked in float32: 2 bytes and 4 of each parameter, and of the linears 9/16 in 4-bit.
    skeleton = planned_skeleton("smolvlm-256m", None)
    layers = skeleton.inventory(FormatSpec()).layers
    linears = sum(x.out_features * x.in_features for x in layers)
    parameters = sum(p.numel() for p in skeleton.model.parameters())
    found = weight_bytes(skeleton.model, layers, FormatSpec())
    assert found == pytest.approx(6 * parameters + 9 / 16 * linears, rel=1e-3)


@pytest.mark.slow
def test_a_batch_takes_more_the_more_it_holds():
    skeleton = planned_skeleton("llama-3.2-11b-vision", None)

    def batch(**changes: int) -> int:
        shape = {"samples": 4, "tokens": 320, "answer_tokens": 64, "vision_rows": 6404, **changes}
        return device_need(skeleton, FormatSpec(), BatchShape(**shape)).batch

    for more in ({"samples": 8}, {"tokens": 4000}, {"answer_tokens": 256}, {"vision_rows": 12_808}):
        assert batch(**more) > batch()


def shape_of(processor: Any, config: Any, layout: Layout, *samples: Sample) -> BatchShape:
    processed = ProcessedSamples(processor, torch.float32, layout)
    return shape_of_batch(config, processed, samples, Batching(size=2, max_new_tokens=5))


def test_the_largest_batch_is_the_one_that_counts():
    short, long = (Sample(x, asked("a red bag " * n), "a cat") for x, n in (("a", 1), ("b", 9)))
    (processor,) = tiny.text_tokenizer()
    # The second of two batches of two has the long text.
    found = shape_of(processor, None, Layout(), short, replace(short, id="c"), long, replace(short, id="d"))
    assert found == shape_of(processor, None, Layout(), long, short) and found.samples == 2
    assert found.tokens > shape_of(processor, None, Layout(), short, short).tokens


@pytest.mark.parametrize("answer", ["a red bag", None])
def test_an_encoder_of_images_alone_has_the_shape_of_what_its_decoder_reads(answer: str | None):
    recipe = sequences.RECIPES["donut"]
    (processor,), config = recipe.processor(), recipe.config()
    layout = Layout(decoder=Decoder(start=1, prompt="decoder", leads=True))
    given = Sample("a", asked("what is it?", tiny.picture(0)), answer)
    found = shape_of(processor, config, layout, given)
    prompt = len(processor.tokenizer("what is it?", add_special_tokens=False)["input_ids"])
    assert (found.samples, found.tokens >= prompt + 3, found.vision_rows) == (1, True, 0)


def test_frames_of_videos_are_counted_as_patches():
    frames = tuple(png(x) for x in tiny.frames(1, 2, 3, 4))
    shown = Sample("a", (Turn("user", (Video(frames), "what moves?")),), "a cat")
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=14, temporal_patch_size=2))
    # The processor makes them 56 x 28 pixels: 4 x 2 patches of 14, of two frames each.
    assert shape_of(video_processor(), config, Layout(), shown).vision_rows == 2 * 8
