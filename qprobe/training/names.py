"""Adapters on exactly the modules that their config names, also in mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_REWRITES = "convert_peft_config_for_transformers"


@contextmanager
def names_as_written() -> Iterator[None]:
    """While open, peft takes the names in a config as they stand.

    For mixtures whose experts were linears in transformers 4, peft 0.21 rewrites them otherwise: it keeps the
    last parts of what a pattern matches, and takes gate_proj, up_proj and down_proj for fused experts. Layers
    that the pattern leaves out would get adapters then, and shared experts none. Can go with a peft that
    tells configs for transformers 4 from others.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # peft before 0.19 rewrites nothing
        conversion = None
    before = getattr(conversion, _REWRITES, None)
    if before is None:
        yield
        return
    setattr(conversion, _REWRITES, lambda *_args, **_options: None)
    try:
        yield
    finally:
        setattr(conversion, _REWRITES, before)
