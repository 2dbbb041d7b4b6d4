"""What a reader needs to recognise a sample and a token of it, kept in the run folder."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from qprobe.data.images import decode
from qprobe.inputs.batch import PAD, VISION, Batch, tokenizer_of
from qprobe.measure.subject import Subject
from qprobe.models.families import family_of
from qprobe.models.grid import Grid, ImageTensors
from qprobe.records import Sample, Video
from qprobe.runs.folder import RunFolder
from qprobe.runs.shown import FILE, ShownSample, write_shown

THUMBNAIL_PX = 144  # of the longer side: recognisable, and about 5 KB
_QUALITY = 65


def show_samples(subject: Subject, groups: Sequence[tuple[Sample, ...]], run: RunFolder) -> None:
    """Write RUN/samples.json for the samples of `groups`, unless the run folder has it already, and whole.

    The folder belongs to one specification, so its samples never change.
    """
    if run.files.is_whole(FILE):
        return
    encoded = (subject.encode(group) for group in groups)
    write_shown(run, [shown for batch in encoded for shown in shown_samples(subject, batch)])


def shown_samples(subject: Subject, batch: Batch) -> list[ShownSample]:
    """The samples of `batch` as a reader is shown them."""
    tokenizer = tokenizer_of(subject.reference.processor)
    ids = batch.inputs.get("input_ids", batch.kinds).cpu()  # images alone have none
    found = []
    for i, sample in enumerate(batch.samples):
        kinds = batch.kinds[i].tolist()
        row = zip(ids[i].tolist(), kinds, strict=True)
        tokens = tuple(None if kind == VISION else tokenizer.decode([t]) for t, kind in row if kind != PAD)
        picture, size = thumbnail(next(_pictures(sample), None))
        grid = None if len(sample.images) != 1 else image_grid(batch, i, subject.model)
        decoded = _decoded(tokenizer, batch, i)
        found.append(
            ShownSample(sample.id, sample.prompt, sample.answer, picture, size, tokens, grid, decoded)
        )
    return found


def _pictures(sample: Sample) -> Iterator[bytes]:
    """Its images, and the frames of its videos."""
    for one in sample.seen:
        frames = one.frames if isinstance(one, Video) else (one,)
        yield from (x for x in frames if isinstance(x, bytes))


def _decoded(tokenizer: Any, batch: Batch, index: int) -> tuple[str, ...]:
    """The tokens that the decoder behind an encoder reads of sample `index`."""
    if batch.decoder_kinds is None:
        return ()
    ids = batch.inputs["decoder_input_ids"][index].cpu()
    return tuple(tokenizer.decode([t]) for t in ids[batch.decoder_kinds[index] != PAD].tolist())


def thumbnail(image: bytes | None) -> tuple[str | None, tuple[int, int] | None]:
    """(data URI of a small JPEG, width and height of the image in pixels); (None, None) without an image."""
    if image is None:
        return None, None
    picture = decode(image).image
    size = picture.size
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    drawn = io.BytesIO()
    picture.save(drawn, format="JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(drawn.getvalue()).decode()}", size


def image_grid(batch: Batch, index: int, model: Any) -> Grid | None:
    """How the image of sample `index` was cut into patches; None if its tensors do not say."""
    vision = getattr(model.config, "vision_config", None)
    thw, pixels = batch.inputs.get("image_grid_thw"), batch.inputs.get("pixel_values")
    tensors = ImageTensors(
        samples=batch.size,
        thw=tuple(thw[index].tolist()) if isinstance(thw, Tensor) and len(thw) == batch.size else None,
        pixels=tuple(pixels.shape) if isinstance(pixels, Tensor) else None,
        patch=_whole(getattr(vision, "patch_size", None)),
        merge=_whole(getattr(vision, "spatial_merge_size", None)),
    )
    return family_of(type(model).__name__).image_grid(tensors)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None
