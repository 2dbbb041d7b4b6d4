"""Declared precisions: exact bytes, and another one in NF4's place without a change to the package."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator

import pandas as pd
import pytest
from click.testing import CliRunner

import qprobe
from qprobe.errors import ManifestError, QprobeError
from qprobe.exports import export_manifest
from qprobe.exports.export import export_targets
from qprobe.formats.protocol import format_from
from qprobe.manifest.read import manifest_from_json, read_manifest
from qprobe.records import FormatSpec
from qprobe.registry import precisions
from tests.registry.int4 import PRECISION, row_bytes
from tests.scanning.asked import TinyFolder, options

scan_command = importlib.import_module("qprobe.cli.scan")  # the package has the command by this name


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The dummy precision is declared while a test runs."""
    with monkeypatch.context() as patch:
        patch.setattr(precisions, "DECLARED", (*precisions.DECLARED, PRECISION))
        importlib.reload(scan_command)
        yield
    importlib.reload(scan_command)


def test_bytes_of_nf4_are_codes_scales_and_the_scales_of_the_scales():
    # 60 x 100 = 6,000 weights: 3,000 bytes of codes, 94 blocks of 64, one block of 256 scales.
    assert precisions.NF4.bytes_of((60, 100), 64, True) == 3_000 + 94 + 4
    assert precisions.NF4.bytes_of((60, 100), 64, False) == 3_000 + 4 * 94
    assert precisions.SIXTEEN_BIT.bytes_of((60, 100), 64, True) == 12_000
    # The weight of three experts is one tensor, whose blocks run on from one expert to the next.
    assert precisions.NF4.bytes_of((3, 60, 100), 64, True) == 9_000 + 282 + 8


def test_calibrated_weights_are_stored_as_the_precision_they_are_rounded_to():
    spec = FormatSpec(precisions.NF4_CALIBRATED.name)
    assert spec.is_calibrated and spec.four_bit_name == spec.quant_type == precisions.NF4.name
    assert not FormatSpec().is_calibrated and FormatSpec().four_bit_name == precisions.NF4.name


@pytest.mark.parametrize(
    ("name", "why"), [("int3", "is not known"), ("fp4", "Nothing can be measured in fp4")]
)
def test_a_format_that_cannot_be_measured_is_refused_with_those_that_can(name: str, why: str):
    with pytest.raises(QprobeError, match=rf"{why}.*nf4, nf4-calibrated\."):
        format_from(FormatSpec(name))


@pytest.mark.usefixtures("declared")
def test_help_offers_a_declared_precision():
    text = CliRunner().invoke(scan_command.scan, ["--help"]).output
    assert "[nf4|nf4-calibrated|int4-rows]" in text


@pytest.mark.slow
@pytest.mark.usefixtures("declared", "no_pictures")
def test_a_declared_precision_takes_the_place_of_nf4_for_a_whole_scan(tiny_folder: TinyFolder, tmp_path):
    folder = tiny_folder("llama")
    result = qprobe.scan(**options(folder, tmp_path / "run", format=PRECISION.name)).result
    plain = qprobe.scan(**options(folder, tmp_path / "plain")).result
    table, other = (pd.read_csv(x.run / "layers.csv").set_index("layer") for x in (result, plain))
    for name, row in table.iterrows():
        assert row["bytes_4bit"] == row_bytes((row["out_features"], row["in_features"]), 64, True), name
    assert (table["weight_nmse"] != other["weight_nmse"]).all() and table["weight_nmse"].between(0, 0.1).all()
    assert result.kl_standard_4bit is not None and result.kl_standard_4bit > 0
    manifest = read_manifest(result.run / "skiplist.json")
    assert manifest.format.name == PRECISION.name
    assert {x.precision for x in manifest.layers} == {PRECISION.name, precisions.SIXTEEN_BIT.name}
    assert any(PRECISION.title in x.reason for x in manifest.layers)
    page = (result.run / "report" / "index.html").read_text()
    assert f'"four_bit":"{PRECISION.name}"' in page
    for target in export_targets():
        with pytest.raises(ManifestError, match=rf"The manifest is for {PRECISION.name}"):
            export_manifest(manifest, target)
    with pytest.raises(
        ManifestError, match=r"in int4-rows cannot be loaded.*Scan in nf4 or nf4-calibrated\."
    ):
        qprobe.load_dynamic_4bit(manifest, str(folder), "cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("declared", "no_pictures")
def test_a_layer_in_another_precision_than_its_format_is_refused(tiny_folder: TinyFolder, tmp_path):
    result = qprobe.scan(
        str(tiny_folder("llama")), device="cpu", out=tmp_path / "run", measures=["weight"]
    ).result
    data = json.loads((result.run / "skiplist.json").read_text())
    four_bit = next(x for x in data["layers"] if x["precision"] == "nf4")
    four_bit["precision"] = PRECISION.name
    with pytest.raises(ManifestError, match=rf"{four_bit['name']} is in int4-rows, but .* nf4 is in nf4"):
        manifest_from_json(data)
