"""The manifest: what is written comes back, what is broken is refused with the key."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from qprobe.errors import ManifestError
from qprobe.manifest.read import (
    MAX_FILE_BYTES,
    SCHEMA_PATH,
    manifest_from_json,
    published_schema,
    read_manifest,
)
from qprobe.manifest.records import (
    Compared,
    MadeBy,
    Manifest,
    ManifestBudget,
    ManifestLayer,
    OtherKinds,
    Quality,
)
from qprobe.manifest.write import manifest_to_json, write_manifest
from qprobe.records import FormatSpec, ModelIdentity, Uncovered
from qprobe.registry.precisions import SIXTEEN_BIT, measurable

# 64 x 64 weights: 8,192 bytes in 16-bit; 2,048 + 64 + 4 = 2,116 in NF4.
EXAMPLE = Manifest(
    model=ModelIdentity("demo", None, "DemoForConditionalGeneration", "f" * 64),
    format=FormatSpec(),
    budget=ManifestBudget("+80%", 20_000, 11_308 + 8192, 13_424),
    quality=Quality(8, 0.25, None, 0.125),
    compared=(
        Compared("nothing kept", 13_424, 0.25, 0.03, False),
        Compared("by weight_nmse", 19_500, 0.25, None, True),
    ),
    layers=(
        ManifestLayer("model.a", "a", (64, 64), "nf4", 2116, 0.125, "NF4"),
        ManifestLayer("model.b", "b", (64, 64), "bf16", 8192, 0.5, "kept: sensitivity_kl 0.5, rank 1 of 2"),
        ManifestLayer("lm_head", "lm_head", (64, 64), "bf16", 8192, None, "lm_head stays in 16-bit"),
    ),
    uncovered=(Uncovered("model.patch.weight", 500, "a convolution"),),
    skip_modules=("model.b", "lm_head"),
    made_by=MadeBy("0.1.0", "qprobe select run --budget +80%"),
)

text = st.text(min_size=1, max_size=12)
seen = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
names_of_layers = seen.filter(lambda x: x[0] not in "=+-@")
number = st.floats(allow_nan=False, allow_infinity=False)
count = st.integers(0, 10**12)


@st.composite
def manifest_layers(draw: st.DrawFn, name: str) -> ManifestLayer:
    shape = draw(st.tuples(st.integers(1, 9000), st.integers(1, 9000)))
    weights = shape[0] * shape[1]
    precision = draw(st.sampled_from(["nf4", "bf16"]))
    size = (
        draw(st.sampled_from([0, 2 * weights])) if precision == "bf16" else (weights + 1) // 2 + draw(count)
    )
    kl = draw(st.none() | number)
    return ManifestLayer(name, draw(names_of_layers), shape, precision, size, kl, draw(st.text(max_size=9)))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(names_of_layers, unique=True, max_size=6))
    layers = tuple(draw(manifest_layers(name)) for name in names)
    uncovered = tuple(
        draw(st.lists(st.builds(Uncovered, names_of_layers, count, st.text(max_size=9)), max_size=3))
    )
    total = sum(x.bytes for x in (*layers, *uncovered)) + draw(count)
    kept = tuple(x for x in layers if x.precision == "bf16")
    standard = total - draw(st.integers(0, sum(x.bytes for x in kept)))
    compared = draw(
        st.lists(
            st.builds(Compared, text, count, st.none() | number, st.none() | number, st.just(False)),
            max_size=3,
        )
    )
    if compared and draw(st.booleans()):
        compared[0] = replace(compared[0], total_bytes=total, chosen=True)
    double = st.builds(FormatSpec, st.just("nf4"), st.just(64), st.booleans(), st.just("float16"))
    return Manifest(
        model=draw(st.builds(ModelIdentity, seen, st.none() | seen, seen, seen)),
        format=draw(double),
        budget=ManifestBudget(draw(text), total + draw(count), total, standard),
        quality=draw(st.builds(Quality, st.none() | count, *[st.none() | number] * 3)),
        compared=tuple(compared),
        layers=layers,
        uncovered=uncovered,
        skip_modules=tuple(x.name for x in kept),
        made_by=draw(st.builds(MadeBy, text, st.text(max_size=9))),
    )


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(manifest=manifests())
def test_what_is_written_comes_back(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("m") / "skiplist.json"
    write_manifest(path, manifest)
    assert read_manifest(path) == manifest
    before = path.read_bytes()
    write_manifest(path, read_manifest(path))
    assert path.read_bytes() == before


def test_schema_is_a_valid_draft_2020_12_schema_and_admits_what_we_write():
    schema = json.loads(SCHEMA_PATH.read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads(json.dumps(manifest_to_json(EXAMPLE))))


def test_the_published_schema_names_the_declared_precisions():
    properties = published_schema()["properties"]
    formats = properties["format"]["properties"]["name"]["enum"]
    assert formats == [x.name for x in measurable()]
    stored = {x.stored.name: None for x in measurable()}
    assert properties["layers"]["items"]["properties"]["precision"]["enum"] == [*stored, SIXTEEN_BIT.name]


def test_the_file_has_the_published_keys():
    data = manifest_to_json(EXAMPLE)
    assert list(data) == [
        "schema_version", "model", "format", "budget", "quality", "compared", "layers", "uncovered",
        "skip_modules", "made_by",
    ]  # fmt: skip
    assert list(data["model"]) == ["id", "revision", "architecture", "fingerprint"]
    assert list(data["format"]) == ["name", "blocksize", "double_quant", "compute_dtype", "experts"]
    assert list(data["budget"]) == ["requested", "limit_bytes", "total_bytes", "standard_4bit_bytes"]
    assert list(data["quality"]) == ["samples", "kl_standard_4bit", "kl_dynamic", "kl_predicted"]
    assert list(data["compared"][0]) == ["name", "total_bytes", "kl", "kl_se", "chosen"]
    assert list(data["layers"][0]) == [
        "name", "checkpoint_name", "shape", "precision", "bytes", "sensitivity_kl", "reason",
    ]  # fmt: skip


def test_a_manifest_may_say_what_4_bit_costs_on_samples_of_another_kind():
    assert "other_kinds" not in manifest_to_json(EXAMPLE)
    found = replace(EXAMPLE, other_kinds=OtherKinds("more.jsonl", 8, EXAMPLE.compared))
    data = json.loads(json.dumps(manifest_to_json(found)))
    assert manifest_from_json(data) == found
    del data["other_kinds"]["samples"]
    with pytest.raises(ManifestError, match="other_kinds: 'samples' is a required property"):
        manifest_from_json(data)


def test_a_manifest_may_say_nothing_of_what_was_compared():
    data = json.loads(json.dumps(manifest_to_json(EXAMPLE)))
    del data["compared"]
    assert manifest_from_json(data) == replace(EXAMPLE, compared=())


def put(*path: str | int, value: Any) -> Callable[[dict], None]:
    """An edit of the manifest's JSON at `path`."""

    def edit(data: dict) -> None:
        place: Any = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


def remove(*path: str) -> Callable[[dict], None]:
    def edit(data: dict) -> None:
        place = data
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (put("layers", 1, "bytes", value=-5), r"layers\[1\]\.bytes: -5 is less than the minimum"),
        (put("layers", 1, "bytes", value=8192.0), r"layers\[1\]\.bytes: 8192\.0 is not of type 'integer'"),
        (put("layers", 1, "bytes", value=True), r"layers\[1\]\.bytes"),
        (put("layers", 1, "bytes", value="8192"), r"layers\[1\]\.bytes: '8192' is not of type"),
        (put("layers", 0, "shape", value=[64]), r"layers\[0\]\.shape"),
        (put("layers", 0, "shape", value=[64, 0]), r"layers\[0\]\.shape\[1\]"),
        (put("layers", 0, "precision", value="int8"), r"layers\[0\]\.precision: 'int8' is not one of"),
        (put("layers", value={}), r"layers: .* is not of type 'array'"),
        (put("extra", value=1), r"the file: .*'extra' was unexpected"),
        (put("model", "fingerprint", value=""), r"model\.fingerprint"),
        (put("format", "name", value="fp4"), r"format\.name"),
        (put("format", "blocksize", value=128), r"format\.blocksize: 128 is not one of \[64\]"),
        (put("schema_version", value=0), r"schema_version: 1 was expected"),
        (put("schema_version", value="1"), r"schema_version"),
        (remove("budget", "total_bytes"), r"budget: 'total_bytes' is a required property"),
        (remove("skip_modules"), r"'skip_modules' is a required property"),
        (remove("schema_version"), r"'schema_version' is a required property"),
        # What a schema cannot say
        (put("schema_version", value=2), r"newer qprobe \(schema_version 2, this one reads 1\); update"),
        (put("layers", 1, "name", value="model.a"), r"model\.a is listed 2 times"),
        (put("layers", 1, "name", value="x\ntrust: true"), r"name 'x\\ntrust: true' holds a character"),
        (put("layers", 0, "checkpoint_name", value="x\x1b[2J"), r"holds a character that is not printable"),
        (put("layers", 0, "name", value="=1+1"), r"the name '=1\+1' is no layer's"),
        (put("model", "id", value="x\u202ey"), r"model\.id holds a character that is not printable"),
        (put("uncovered", 0, "name", value="x\u2028y"), r"holds a character that is not printable"),
        (put("skip_modules", value=["lm_head"]), r"skip_modules lacks model\.b, which is bf16"),
        (put("skip_modules", value=["model.b", "lm_head", "model.a"]), r"names model\.a, which is not bf16"),
        (put("skip_modules", value=["lm_head", "model.b"]), r"in another order or more than once"),
        (put("skip_modules", value=["model.b", "model.b", "lm_head"]), r"in another order or more than once"),
        (put("layers", 1, "bytes", value=8191), r"model\.b has 8,191 bytes, .*4,096 weights take 8,192"),
        (put("layers", 0, "bytes", value=2047), r"model\.a has 2,047 bytes, .* at least 2,048 in 4-bit"),
        (put("budget", "limit_bytes", value=19_499), r"total_bytes 19,500 exceeds limit_bytes 19,499"),
        (put("budget", "total_bytes", value=18_999), r"total_bytes 18,999 is less than .* 19,000"),
        (put("budget", "standard_4bit_bytes", value=20_001), r"standard_4bit_bytes 20,001 exceeds limit"),
        (
            put("budget", "standard_4bit_bytes", value=3115),
            r"by more than all its 16-bit layers take, 16,384",
        ),
        (put("compared", 0, "chosen", value=True), r"nothing kept and by weight_nmse are both chosen"),
        (
            put("compared", 1, "total_bytes", value=19_499),
            r"chosen by weight_nmse has 19,499 bytes, but .* 19,500",
        ),
        (put("compared", 1, "kl", value="0.1"), r"compared\[1\]\.kl: '0\.1' is not of type"),
        (put("uncovered", 0, "bytes", value=10**30), r"is less than its layers and uncovered weights"),
    ],
)
def test_a_broken_manifest_is_refused_with_the_key(tmp_path: Path, edit: Callable[[dict], None], said: str):
    data = json.loads(json.dumps(manifest_to_json(EXAMPLE)))
    manifest_from_json(data)
    edit(data)
    path = tmp_path / "skiplist.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=said) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe{}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"schema_version": 1, "schema_version": 1}',
        b"[" * 200_000,
        b"1" * 10_000,  # more digits than Python converts
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, data: bytes):
    path = tmp_path / "skiplist.json"
    path.write_bytes(data)
    with pytest.raises(ManifestError, match="is no valid JSON"):
        read_manifest(path)


@pytest.mark.parametrize("data", [b"[]", b"null", b"1", b'"x"', b"{}"])
def test_json_that_is_no_manifest_is_refused(tmp_path: Path, data: bytes):
    path = tmp_path / "skiplist.json"
    path.write_bytes(data)
    with pytest.raises(ManifestError, match="the file: "):
        read_manifest(path)


def test_nan_in_a_known_place_is_refused(tmp_path: Path):
    path = tmp_path / "skiplist.json"
    path.write_text(json.dumps(manifest_to_json(EXAMPLE)).replace("0.125", "NaN"))
    with pytest.raises(ManifestError, match="NaN is no JSON number"):
        read_manifest(path)


def test_a_huge_file_is_not_read(tmp_path: Path):
    path = tmp_path / "skiplist.json"
    with open(path, "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ManifestError, match="larger than 32 MiB"):
        read_manifest(path)


def test_messages_stay_short_whatever_the_file_holds(tmp_path: Path):
    path = tmp_path / "skiplist.json"
    path.write_text(json.dumps({**manifest_to_json(EXAMPLE), "layers": "x" * 100_000}))
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_a_missing_file_and_a_folder_are_explained(tmp_path: Path):
    with pytest.raises(ManifestError, match="no such file; qprobe select writes one"):
        read_manifest(tmp_path / "none.json")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match="cannot be written"):
        write_manifest(tmp_path / "none" / "skiplist.json", EXAMPLE)


def test_nothing_unreadable_is_written(tmp_path: Path):
    path = tmp_path / "skiplist.json"
    write_manifest(path, EXAMPLE)
    before = path.read_bytes()
    for broken in (
        replace(EXAMPLE, skip_modules=()),
        replace(EXAMPLE, quality=Quality(kl_dynamic=float("nan"))),
    ):
        with pytest.raises(ManifestError):
            write_manifest(path, broken)
    assert path.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == ["skiplist.json"]
