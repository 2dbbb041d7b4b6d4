"""The manifest: which layers of a model stay in 16-bit, as checked JSON (`skiplist.json`).

`manifest.schema.json` beside this file is the published format; `read_manifest` also checks what a schema
cannot say. Version 1 is the first.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from jsonschema import Draft202012Validator, validators

from qprobe.errors import ManifestError
from qprobe.records import CodesFile, FormatSpec, ModelIdentity, Uncovered
from qprobe.system.files import write_atomic

SCHEMA_VERSION = 1
SCHEMA_PATH = Path(__file__).with_name("manifest.schema.json")

# The largest models have a few thousand linears of about 300 bytes each; this is a hundred times that.
MAX_FILE_BYTES = 64 * 2**20


# Names of two lists among those compared.
NOTHING = "nothing kept"
NEAREST = "standard 4-bit: rounded to nearest, nothing kept"  # compared with calibrated weights


@dataclass(frozen=True)
class ManifestBudget:
    """requested: as typed ("+10%"); the rest in bytes of every parameter and persistent buffer as stored."""

    requested: str
    limit_bytes: int
    total_bytes: int
    standard_4bit_bytes: int


@dataclass(frozen=True)
class Quality:
    """KL divergence to the 16-bit model in nats per answer token; None where not measured."""

    samples: int | None = None
    kl_standard_4bit: float | None = None
    kl_dynamic: float | None = None
    kl_predicted: float | None = None


@dataclass(frozen=True)
class Compared:
    """One list that was measured on the held-out samples; kl and its standard error kl_se as in `Quality`."""

    name: str
    total_bytes: int
    kl: float | None
    kl_se: float | None
    chosen: bool


@dataclass(frozen=True)
class LayerChoice:
    """One linear and its precision. shape: (out_features, in_features); bytes: of the weight as stored."""

    name: str
    checkpoint_name: str
    shape: tuple[int, int]
    precision: str
    bytes: int
    sensitivity_kl: float | None
    reason: str


@dataclass(frozen=True)
class MadeBy:
    """qprobe: its version; time: ISO 8601 with offset."""

    qprobe: str
    command: str
    time: str


@dataclass(frozen=True)
class Manifest:
    """What `skiplist.json` holds, except its schema version.

    compared: the lists that this one was chosen among by measured KL; empty where nothing was measured.
    layers: every linear in execution order. skip_modules: the exact names of those in 16-bit, in that order.
    codes: the file with the calibrated weights, its path from the manifest's folder; None for other formats.
    """

    model: ModelIdentity
    format: FormatSpec
    budget: ManifestBudget
    quality: Quality
    compared: tuple[Compared, ...] = field(default=(), kw_only=True)
    layers: tuple[LayerChoice, ...]
    uncovered: tuple[Uncovered, ...]
    skip_modules: tuple[str, ...]
    made_by: MadeBy
    codes: CodesFile | None = None


def read_manifest(path: Path | str) -> Manifest:
    """The manifest in the file `path`.

    Raises ManifestError if the file is missing, is no JSON, breaks the schema, was written by a newer qprobe,
    or contradicts itself (bytes, names, skip_modules); the message names the file and the key.
    """
    try:
        return manifest_from_json(strict_json(_read_bytes(Path(path))))
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from None
    except ValueError as error:
        raise ManifestError(
            f"{path} is no valid JSON ({error}); make it again with qprobe select, or copy it again."
        ) from None


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


def moved(manifest: Manifest, origin: Path, target: Path) -> Manifest:
    """`manifest` of the folder `origin` as it must read in `target`: the codes stay where they are."""
    if manifest.codes is None:
        return manifest
    file = (Path(origin) / manifest.codes.file).resolve()
    path = os.path.relpath(file, Path(target).resolve()).replace(os.sep, "/")
    return replace(manifest, codes=replace(manifest.codes, file=path))


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as the JSON object of its schema."""
    data = {"schema_version": SCHEMA_VERSION, **asdict(manifest)}
    if manifest.codes is None:
        del data["codes"]  # older readers know no such key
    return data


def manifest_from_json(data: Any) -> Manifest:
    """The manifest of a decoded JSON value; raises ManifestError as `read_manifest` does."""
    _refuse_newer(data)
    _check_schema(data)
    manifest = Manifest(
        model=ModelIdentity(**data["model"]),
        format=FormatSpec(**data["format"]),
        budget=ManifestBudget(**data["budget"]),
        quality=Quality(**data["quality"]),
        compared=tuple(Compared(**x) for x in data.get("compared", ())),
        layers=tuple(LayerChoice(**{**x, "shape": tuple(x["shape"])}) for x in data["layers"]),
        uncovered=tuple(Uncovered(**x) for x in data["uncovered"]),
        skip_modules=tuple(data["skip_modules"]),
        made_by=MadeBy(**data["made_by"]),
        codes=CodesFile(**data["codes"]) if "codes" in data else None,
    )
    _check_codes(manifest)
    _check_names(manifest)
    _check_bytes(manifest)
    _check_compared(manifest)
    return manifest


def strict_json(data: bytes) -> Any:
    """The JSON value in `data`.

    Raises ValueError for what Python's reader lets pass or chokes on: NaN, infinities, numbers beyond
    double precision, a key given twice, nesting without end.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite_number,
            object_pairs_hook=_object_without_repeats,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _read_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ManifestError("no such file; qprobe select writes one.") from None
    except OSError as error:
        raise ManifestError(f"cannot be read ({error.strerror}); pass the path of a skiplist.json.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ManifestError(f"larger than {MAX_FILE_BYTES // 2**20} MiB, so no manifest; check the path.")
    return data


def _refuse_constant(token: str) -> NoReturn:
    raise ValueError(f"{token} is no JSON number")


def _finite_number(token: str) -> float:
    number = float(token)
    if not math.isfinite(number):
        raise ValueError(f"the number {token[:40]} is too large")
    return number


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    return result


def _refuse_newer(data: Any) -> None:
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ManifestError(
            f"written by a newer qprobe (schema_version {version}, this one reads {SCHEMA_VERSION}); "
            "update qprobe with pip install -U qprobe."
        )


@cache
def _validator() -> Any:
    # JSON Schema takes 1.0 for an integer; byte counts are Python ints here.
    checker = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    strict = validators.extend(Draft202012Validator, type_checker=checker)
    return strict(json.loads(SCHEMA_PATH.read_text("utf-8")))


def _check_schema(data: Any) -> None:
    error = next(_validator().iter_errors(data), None)
    if error is not None:
        key = error.json_path.removeprefix("$").removeprefix(".") or "the file"
        said = (
            error.message if len(error.message) <= 200 else f"{error.message[:90]} ... {error.message[-90:]}"
        )
        raise ManifestError(f"{key}: {said}. Make the manifest again with qprobe select.")


def _check_codes(manifest: Manifest) -> None:
    if manifest.format.is_calibrated != (manifest.codes is not None):
        what = "names no file of weights" if manifest.codes is None else "has no calibrated weights to name"
        raise ManifestError(
            f"codes: the format {manifest.format.name} {what}; make the manifest again with qprobe select."
        )


def _check_names(manifest: Manifest) -> None:
    for name, count in Counter(x.name for x in manifest.layers).items():
        if count > 1:
            raise ManifestError(f"layers: {name} is listed {count} times; each linear may stand there once.")
    kept = tuple(x.name for x in manifest.layers if x.precision == "bf16")
    if manifest.skip_modules == kept:
        return
    listed = set(manifest.skip_modules)
    missing = [x for x in kept if x not in listed]
    extra = [x for x in manifest.skip_modules if x not in set(kept)]
    what = (
        f"lacks {missing[0]}, which is bf16 in layers"
        if missing
        else f"names {extra[0]}, which is not bf16 in layers"
        if extra
        else "has the right names in another order or more than once"
    )
    raise ManifestError(
        f"skip_modules {what}; it must list the {len(kept)} bf16 layers in the order of layers."
    )


def _check_bytes(manifest: Manifest) -> None:
    for layer in manifest.layers:
        weights = layer.shape[0] * layer.shape[1]
        # Tied weights are counted elsewhere and have 0 bytes here; transformers keeps some in float32.
        if layer.precision == "bf16" and layer.bytes not in (0, 2 * weights, 4 * weights):
            raise ManifestError(
                f"layers: {layer.name} has {layer.bytes:,} bytes, but its {weights:,} weights take "
                f"{2 * weights:,} in 16-bit; the file was changed by hand or is damaged."
            )
        if layer.precision == "nf4" and layer.bytes < (weights + 1) // 2:
            raise ManifestError(
                f"layers: {layer.name} has {layer.bytes:,} bytes, but its {weights:,} weights take "
                f"at least {(weights + 1) // 2:,} in 4-bit; the file was changed by hand or is damaged."
            )
    budget = manifest.budget
    listed = sum(x.bytes for x in manifest.layers) + sum(x.bytes for x in manifest.uncovered)
    kept = sum(x.bytes for x in manifest.layers if x.precision == "bf16")
    if budget.total_bytes < listed:
        problem = (
            f"total_bytes {budget.total_bytes:,} is less than its layers and uncovered weights, {listed:,}"
        )
    elif budget.total_bytes > budget.limit_bytes:
        problem = f"total_bytes {budget.total_bytes:,} exceeds limit_bytes {budget.limit_bytes:,}"
    elif budget.standard_4bit_bytes > budget.limit_bytes:
        problem = (
            f"standard_4bit_bytes {budget.standard_4bit_bytes:,} exceeds limit_bytes {budget.limit_bytes:,}"
        )
    elif budget.total_bytes - budget.standard_4bit_bytes > kept:
        problem = (
            f"total_bytes {budget.total_bytes:,} exceeds standard_4bit_bytes {budget.standard_4bit_bytes:,} "
            f"by more than all its 16-bit layers take, {kept:,}"
        )
    else:
        return
    raise ManifestError(f"budget: {problem}; make the manifest again with qprobe select.")


def _check_compared(manifest: Manifest) -> None:
    chosen = [x for x in manifest.compared if x.chosen]
    if len(chosen) > 1:
        raise ManifestError(
            f"compared: {chosen[0].name} and {chosen[1].name} are both chosen; only one can be."
        )
    for one in chosen:
        if one.total_bytes != manifest.budget.total_bytes:
            raise ManifestError(
                f"compared: the chosen {one.name} has {one.total_bytes:,} bytes, but budget.total_bytes is "
                f"{manifest.budget.total_bytes:,}; the file was changed by hand or is damaged."
            )
