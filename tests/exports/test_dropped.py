"""An export target is one file, found by looking into the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from qprobe.cli import main
from qprobe.errors import ManifestError
from qprobe.exports import export_manifest, export_targets
from qprobe.manifest.write import write_manifest
from tests.dropped import dropped
from tests.exports.manifests import manifest_of

DUMMY = r'''
    """A tool that nobody has."""

    from qprobe.exports.keys import Reader
    from qprobe.exports.target import Target, Written, written_as

    def rule(entry, name):
        return name.startswith(entry)

    def readers(manifest):
        keep = {x.name: x.precision == "bf16" for x in manifest.layers}
        return [Reader("dummy 1.0", rule, keep)]

    def write(manifest, entries):
        return Written("keep " + " ".join(entries) + "\n", ("A note of the dummy's.",))

    TARGET = Target(
        "dummy", "a line for a tool that nobody has", readers, write, written_as(str, lambda x: x + "."),
        own_codes="by throwing dice",
    )
'''


@pytest.fixture
def dummy(tmp_path: Path) -> Iterator[None]:
    with dropped("qprobe.exports.targets", "dummy", DUMMY, tmp_path / "dropped", export_targets):
        yield


def test_a_target_that_is_dropped_into_the_folder_is_an_option_and_exported_to(dummy: None, tmp_path: Path):
    path = tmp_path / "m.json"
    write_manifest(path, manifest_of({"a": False, "lm_head": True}))
    help_text = CliRunner().invoke(main, ["export", "--help"]).stdout
    assert "  dummy                a line for a tool that nobody has" in help_text
    done = CliRunner().invoke(main, ["export", str(path), "--to", "dummy", "--json"])
    assert json.loads(done.stdout) == {
        "tool": "dummy",
        "text": "keep lm_head\n",
        "notes": ["A note of the dummy's."],
        "layers_16bit": ["lm_head"],
    }


def test_its_entries_are_held_against_its_rule_without_its_doing_so(dummy: None):
    # Its rule reads an entry as a beginning, so that "a.1" would keep "a.10" too, and "a.1." neither.
    with pytest.raises(
        ManifestError, match=r"Under dummy 1\.0 the entry 'a\.1' keeps 2 layers.* first a\.10"
    ):
        export_manifest(manifest_of({"a.1": True, "a.10": False}), "dummy")


def test_what_becomes_of_calibrated_codes_is_said_for_it_too(dummy: None):
    manifest = manifest_of({"a": False, "lm_head": True})
    calibrated = replace(manifest, format=replace(manifest.format, name="nf4-calibrated"))
    assert "by throwing dice" in export_manifest(calibrated, "dummy").notes[-1]


def test_without_its_file_it_is_no_option():
    result = CliRunner().invoke(main, ["export", "m.json", "--to", "dummy"])
    assert result.exit_code == 2 and "'dummy' is not one of autoround, axolotl," in result.stderr
    assert list(export_targets()) == sorted(export_targets())


@pytest.mark.parametrize("tool", export_targets())
def test_a_precision_that_a_tool_does_not_know_is_refused_by_name(tool: str):
    manifest = manifest_of({"a": False, "lm_head": True})
    other = replace(manifest, format=replace(manifest.format, name="fp4"))
    with pytest.raises(ManifestError, match=rf"The manifest is for fp4, and {tool} takes nf4 only"):
        export_manifest(other, tool)
