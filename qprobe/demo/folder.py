"""Where the embedded demo model lies."""

from __future__ import annotations

from pathlib import Path


def demo_folder() -> Path:
    """The folder of the embedded demo model, as `from_pretrained` takes it."""
    return Path(__file__).parent / "model"
