"""The transformers config of a model: of its files, or of the catalogue from data alone."""

from __future__ import annotations

import json
from typing import Any

from qprobe.loading.source import Source, explained
from qprobe.models.entry import Entry
from qprobe.models.geometry import read_geometry


def load_config(source: Source) -> Any:
    """The transformers config of `source`. Raises ModelError if it cannot be had."""
    from transformers import AutoConfig

    with explained(source):
        # Said in full: left out, transformers would ask on the terminal whether to run the code.
        return AutoConfig.from_pretrained(
            source.location, revision=source.revision or "main", trust_remote_code=False
        )


def model_class(config: Any) -> Any:
    """The auto class that builds `config`: image + text to text, causal text, or a bare encoder."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    wanted = (getattr(config, "architectures", None) or [""])[0]
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        mapped: Any = auto._model_mapping.get(type(config), None)  # the public API has no lookup by config
        if mapped is not None and wanted in ("", mapped.__name__):
            return auto
    return AutoModel


def catalogue_config(entry: Entry) -> Any:
    """The transformers config of a catalogue entry, from data alone."""
    from transformers import AutoConfig

    config = read_geometry(entry.geometry).config
    if config is None:
        from qprobe.demo import demo_folder

        return AutoConfig.from_pretrained(demo_folder())
    # transformers fills the dictionaries that it is given, and these are cached.
    return AutoConfig.for_model(**json.loads(json.dumps(config)))
