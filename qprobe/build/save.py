"""A model in 4-bit as a checkpoint that transformers loads by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        _save_processor(processor, target)
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written ({error.strerror or error}). Make room first."
        ) from error
    return target


def _save_processor(processor: Any, target: Path) -> None:
    """`processor`, a tokenizer or None, into the folder `target`.

    One that lacks a part, as Qwen2-VL's lacks its video half on a machine without torchvision, cannot be
    saved whole; its parts then lie in the folder as they do in checkpoints on the hub.
    """
    names = processor.get_attributes() if hasattr(processor, "get_attributes") else ()
    parts = [getattr(processor, name) for name in names]
    if None not in parts:
        parts = [] if processor is None else [processor]
    elif processor.chat_template:
        (target / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
    for part in parts:
        if part is not None:
            part.save_pretrained(target)
