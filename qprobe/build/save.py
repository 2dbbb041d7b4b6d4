"""A model in 4-bit as a checkpoint that transformers loads by itself."""

from __future__ import annotations

from pathlib import Path

from qprobe.build.load import load_dynamic_4bit
from qprobe.errors import ModelError
from qprobe.manifest import Manifest


def save_dynamic_4bit(
    manifest: Manifest | str | Path,
    out: str | Path,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    folder: str | Path | None = None,
) -> Path:
    """`out`, a checkpoint of the model that `manifest` describes, with its processor.

    `from_pretrained` loads it without qprobe: its config names the exact layers that stay in 16-bit, and its
    4-bit weights, calibrated or not, are stored as bitsandbytes stores them. Other arguments and errors: as
    of `load_dynamic_4bit`; ModelError if `out` holds files already or cannot be written.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} is there already and not empty. Pass another folder.")
    loaded, processor = load_dynamic_4bit(manifest, model, device, dtype, folder)
    try:
        loaded.save_pretrained(target)
        if processor is not None:
            processor.save_pretrained(target)
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written ({error.strerror or error}). Make room first."
        ) from error
    return target
