"""A manifest out of its JSON: held against the published schema, then against itself."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, validators

from qprobe.errors import ManifestError
from qprobe.manifest.check import check_manifest
from qprobe.manifest.records import Manifest
from qprobe.registry.precisions import SIXTEEN_BIT, measurable
from qprobe.system.decoding import check_visible, decode, strict_json
from qprobe.system.foreign import read_foreign_if_there
from qprobe.system.wording import SAID, shortened

SCHEMA_VERSION = 1
"""Of the manifests that this qprobe reads and writes. Version 1 is the first."""

SCHEMA_PATH = Path(__file__).with_name("manifest.schema.json")

# The largest models have a few thousand linears of about 300 bytes each; this is fifty times that.
MAX_FILE_BYTES = 32 * 2**20

_AGAIN = "Make the manifest again with qprobe select."


def read_manifest(path: Path | str) -> Manifest:
    """The manifest in the file `path`.

    Raises ManifestError if the file is missing, is no JSON, breaks the schema, was written by a newer qprobe,
    or contradicts itself (bytes, names, skip_modules); the message names the file and the key.
    """
    fix = "Pass the path of a skiplist.json."
    data = read_foreign_if_there(Path(path), ManifestError, fix, MAX_FILE_BYTES)
    if data is None:
        raise ManifestError(f"{path}: no such file; qprobe select writes one.")
    try:
        return manifest_from_json(strict_json(data))
    except ManifestError as error:
        raise ManifestError(f"{path}: {shortened(str(error), SAID)}") from None
    except ValueError as error:
        raise ManifestError(
            f"{path} is no valid JSON ({error}); make it again with qprobe select, or copy it again."
        ) from None


def manifest_from_json(data: Any) -> Manifest:
    """The manifest of a decoded JSON value; raises ManifestError as `read_manifest` does."""
    _refuse_newer(data)
    _check_schema(data)
    said = {key: value for key, value in data.items() if key != "schema_version"}
    try:
        check_visible(said["model"], "model")
        manifest = decode(Manifest, {"compared": [], **said}, "the manifest")
    except ValueError as error:
        raise ManifestError(f"{error}. {_AGAIN}") from None
    check_manifest(manifest)
    return manifest


def _refuse_newer(data: Any) -> None:
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ManifestError(
            f"written by a newer qprobe (schema_version {version}, this one reads {SCHEMA_VERSION}); "
            "update qprobe with pip install -U qprobe."
        )


def published_schema() -> dict[str, Any]:
    """The JSON Schema of manifests, as it lies in the package: its names of precisions are those declared."""
    return json.loads(SCHEMA_PATH.read_text("utf-8"))


@cache
def _validator(formats: tuple[str, ...], layers: tuple[str, ...]) -> Any:
    schema = published_schema()
    schema["properties"]["format"]["properties"]["name"]["enum"] = formats
    schema["properties"]["layers"]["items"]["properties"]["precision"]["enum"] = layers
    # JSON Schema takes 1.0 for an integer; byte counts are Python ints here.
    checker = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    strict = validators.extend(Draft202012Validator, type_checker=checker)
    return strict(schema)


def _precision_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a manifest may call its format, and the precision of a layer."""
    formats = measurable()
    stored = dict.fromkeys(x.stored.name for x in formats)
    return tuple(x.name for x in formats), (*stored, SIXTEEN_BIT.name)


def _check_schema(data: Any) -> None:
    error = next(_validator(*_precision_names()).iter_errors(data), None)
    if error is not None:
        key = error.json_path.removeprefix("$").removeprefix(".") or "the file"
        raise ManifestError(f"{key}: {shortened(error.message, 200)}. {_AGAIN}")
