"""The transformers config of a model that the catalogue knows, from data alone."""

from __future__ import annotations

import json
from typing import Any

from qprobe.models.entry import Entry
from qprobe.models.geometry import read_geometry


def catalogue_config(entry: Entry) -> Any:
    """The transformers config of a catalogue entry, from data alone. The entry must have a geometry."""
    from transformers import AutoConfig

    assert entry.geometry is not None, entry.alias
    config = read_geometry(entry.geometry).config
    if config is None:
        from qprobe.demo import demo_folder

        return AutoConfig.from_pretrained(demo_folder())
    # transformers fills the dictionaries that it is given, and these are cached.
    return AutoConfig.for_model(**json.loads(json.dumps(config)))
