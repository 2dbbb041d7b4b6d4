"""The embedded demo model, its scenes, its training recipe, and the model with planted outliers."""

from __future__ import annotations

from pathlib import Path


def demo_folder() -> Path:
    """The folder of the embedded demo model, as `from_pretrained` takes it."""
    return Path(__file__).parent / "model"


def outliers_folder() -> Path:
    """The folder of `demo-outliers`, made in the user's cache on first use.

    It holds the demo's weights after an exact re-parameterization: known ground truth for tests, not
    a naturally trained model.
    """
    from qprobe.demo.outliers import cached_outliers  # imports torch

    return cached_outliers(demo_folder())
