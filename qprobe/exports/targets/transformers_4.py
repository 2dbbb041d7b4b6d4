"""transformers 4: keywords of BitsAndBytesConfig with the names that its versions had."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qprobe.exports.keys import transformers_4_readers
from qprobe.exports.target import Target, Written, written_as
from qprobe.exports.writing import bits_and_bytes
from qprobe.manifest.records import Manifest


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """A JSON object of the keywords."""
    return Written(
        json.dumps(bits_and_bytes(manifest, entries), indent=2) + "\n",
        (
            "Names of transformers 4.52 to 4.57 and of 4.51 and before stand in one list; each ignores the "
            "other's.",
        ),
    )


TARGET = Target(
    name="transformers-4",
    summary="the same keywords with the names of transformers 4",
    readers=transformers_4_readers,
    write=write,
    lists=written_as(str),  # entries are plain text there
)
