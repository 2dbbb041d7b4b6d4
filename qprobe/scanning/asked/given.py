"""What Python hands to a scan in place of names: a loaded model, images in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qprobe.errors import ModelError, SampleError
from qprobe.loading.loaded import LoadedModel, loaded_model


def given_model(model: Any, processor: Any) -> LoadedModel | None:
    """The loaded model; None where `model` is a name or a folder. Raises ModelError for anything else."""
    if not isinstance(model, str | Path):
        return loaded_model(model, processor)
    if processor is not None:
        raise ModelError(
            f"processor goes with a loaded model, and {str(model)!r} brings its own. Leave it out, or pass "
            "the model itself."
        )
    return None


def images_or_rows(images: Any, data: Any) -> tuple[Path | None, Any]:
    """(folder of images, data): images in memory become rows of data.

    images: a folder, or images as of `qprobe.data.pictures.Pictures.find`, one or several. Raises SampleError
    where images in memory come with data, which is another source of samples.
    """
    if images is None or isinstance(images, str | Path):
        return None if images is None else Path(images), data
    if data is not None:
        raise SampleError("Both images and data are given. Pass one of them; a row of data may show images.")
    if hasattr(images, "__array_interface__") and not _is_stack(images):
        return None, _rows([images])
    if not isinstance(images, Iterable):
        raise SampleError(
            f"images is a {type(images).__name__}. Pass a folder, or a list of paths, of Pillow's images or "
            "of arrays."
        )
    return None, _rows(images)


def _is_stack(images: Any) -> bool:
    """True for an array of several images."""
    return getattr(images, "ndim", 0) == 4


def _rows(images: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for image in images:
        is_path = isinstance(image, str | Path)
        yield {"image": image, **({"id": Path(image).name} if is_path else {})}
