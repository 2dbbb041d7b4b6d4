"""Wrong input, through the command line and the real library: one sentence, exit code 1, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from qprobe.manifest.write import write_manifest
from tests import tiny
from tests.checkpoint.manifests import manifest_for

Run = Callable[..., Result]
TinyFolder = Callable[[str], Path]


def explained(result: Result) -> str:
    """The one line on stderr of a command that failed as it should."""
    assert result.exit_code == 1 and result.stdout == "", (result.stdout, result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and line.endswith(".")
    return line


@pytest.fixture
def scan(qprobe: Run, tiny_folder: TinyFolder, tmp_path: Path) -> Run:
    """`scan("--images", folder)`: a scan of a tiny model that sees, on three samples at most."""

    def run(*arguments: object, model: str | None = None) -> Result:
        name = model or str(tiny_folder("qwen2_vl"))
        device = () if "--device" in arguments else ("--device", "cpu")
        common = (*device, "--samples", 3, "--max-new-tokens", 2, "--out", tmp_path / "run")
        return qprobe("scan", "--model", name, *common, *arguments)

    return run


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere"])
def test_no_such_model(scan: Run, name: str):
    assert f"No model {name!r}" in explained(scan(model=name))


def test_a_folder_that_is_no_model(scan: Run, tmp_path: Path):
    assert "holds no config.json" in explained(scan(model=str(tmp_path)))


def test_a_missing_image_folder(scan: Run, tmp_path: Path):
    assert "photos does not exist" in explained(scan("--images", tmp_path / "photos"))


def test_an_image_in_the_place_of_a_folder(scan: Run, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(tiny.picture(0))
    assert "a.png is a file, and --images takes a folder" in explained(scan("--images", tmp_path / "a.png"))


def test_a_file_in_the_place_of_the_joined_run(qprobe: Run, run_folder: Path, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    said = explained(qprobe("join", run_folder, "--out", tmp_path / "out"))
    assert "out is a file, and the joined run is a folder" in said


def test_an_empty_image_folder(scan: Run, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    assert "photos is empty" in explained(scan("--images", tmp_path / "photos"))


def test_a_folder_without_any_image(scan: Run, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    assert "notes.txt: left out, it is no image." in explained(scan("--images", tmp_path / "photos"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_file_that_is_no_image_is_skipped_and_named(scan: Run, tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(tiny.picture(i))
    (folder / "1.txt").write_text("no image")
    result = scan("--images", folder, "--json")
    assert result.exit_code == 0
    assert "1.txt: left out, it is no image." in json.loads(result.stdout)["notes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "data.jsonl is empty"),
        ("no json", "No line of data.jsonl is left to measure. data.jsonl line 1: it is not a complete JSON"),
        ('{"image": "nowhere.png"}', "No line of data.jsonl is left to measure. data.jsonl line 1: image"),
    ],
)
def test_data_without_a_usable_line(scan: Run, tmp_path: Path, lines: str, said: str):
    (tmp_path / "data.jsonl").write_text(lines)
    assert said in explained(scan("--data", tmp_path / "data.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "1KiB"), "is below standard 4-bit"),
        (("--budget", "much"), "Budget 'much' cannot be read"),
        (("--max-kl", "-1"), "is no positive number"),
        (("--by", "beauty"), "'beauty' is no measure"),
        (("--ablate", "model.layers.99"), "is no linear layer of this model"),
        (("--device", "quantum"), "is not a device name"),
    ],
)
def test_what_cannot_be_asked(scan: Run, tmp_path: Path, arguments: tuple[str, ...], said: str):
    assert said in explained(scan(*arguments))
    assert not (tmp_path / "run").exists()


def test_a_seed_that_built_in_scenes_do_not_have(scan: Run):
    assert "--seed 1000 is out of range" in explained(scan("--seed", 1000, model="demo"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_run_folder_of_another_scan(scan: Run, tiny_folder: TinyFolder):
    assert scan().exit_code == 0
    assert "holds another scan" in explained(scan("--prompt", "another question"))


def test_a_manifest_for_another_model(qprobe: Run, tiny_folder: TinyFolder, tmp_path: Path):
    manifest, other = tmp_path / "skiplist.json", tiny_folder("llama_tied")
    write_manifest(manifest, manifest_for(tiny_folder("llama")))
    result = qprobe("compare", "--manifest", manifest, "--model", other, "--device", "cpu")
    assert "The manifest was written for llama" in explained(result) and "llama_tied" in result.stderr


def test_a_manifest_whose_model_is_nowhere(qprobe: Run, tiny_folder: TinyFolder, tmp_path: Path):
    manifest = manifest_for(tiny_folder("llama"))
    write_manifest(tmp_path / "m.json", replace(manifest, model=replace(manifest.model, id="lost-model")))
    assert "'lost-model'" in explained(qprobe("compare", "--manifest", tmp_path / "m.json"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("", "is no valid JSON"),
        ("{", "is no valid JSON"),
        ("{}", "is a required property"),
        ('{"schema_version": 2}', "written by a newer qprobe"),
    ],
)
def test_a_broken_manifest(qprobe: Run, tmp_path: Path, text: str | None, said: str):
    path = tmp_path / "skiplist.json"
    if text is not None:
        path.write_text(text)
    assert said in explained(qprobe("compare", "--manifest", path))
