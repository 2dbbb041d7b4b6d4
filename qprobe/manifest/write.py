"""A manifest into its file, as the JSON that `qprobe.manifest.read` accepts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qprobe.errors import ManifestError
from qprobe.manifest.read import SCHEMA_VERSION, manifest_from_json
from qprobe.manifest.records import Manifest
from qprobe.system.files import write_atomic


def write_manifest(path: Path | str, manifest: Manifest) -> None:
    """Write `manifest` to `path`; afterwards the file holds either all of it or what it held before.

    Raises ManifestError, writing nothing, if `read_manifest` would refuse it or the file cannot be written.
    """
    try:
        text = json.dumps(manifest_to_json(manifest), indent=2, allow_nan=False) + "\n"
        manifest_from_json(json.loads(text))
    except ValueError as error:
        raise ManifestError(f"The manifest holds a number that JSON cannot: {error}; use None.") from None
    try:
        write_atomic(Path(path), text.encode())
    except OSError as error:
        raise ManifestError(
            f"{path} cannot be written ({error.strerror}). Make room, or choose another file."
        ) from error


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as the JSON object of its schema."""
    data = {"schema_version": SCHEMA_VERSION, **asdict(manifest)}
    for key in ("codes", "other_kinds"):  # of few manifests
        if data[key] is None:
            del data[key]
    return data
