"""transformers 5: keywords of BitsAndBytesConfig."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qprobe.exports.keys import transformers_readers
from qprobe.exports.target import Target, Written
from qprobe.exports.writing import bits_and_bytes
from qprobe.manifest.records import Manifest


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """A JSON object of the keywords."""
    return Written(json.dumps(bits_and_bytes(manifest, entries), indent=2) + "\n")


TARGET = Target(
    name="transformers",
    summary="keywords of BitsAndBytesConfig, as JSON; transformers 5",
    readers=transformers_readers,
    write=write,
)
