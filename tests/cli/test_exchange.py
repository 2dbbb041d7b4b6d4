"""`export`, `import` and `audit` as a user types them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.manifest.read import read_manifest
from qprobe.manifest.write import write_manifest
from tests.checkpoint.manifests import every_third, manifest_for
from tests.cli.test_mistakes import explained

Run = Callable[..., Result]
TinyFolder = Callable[[str], Path]


@pytest.fixture
def manifest(tiny_folder: TinyFolder, tmp_path: Path) -> Path:
    folder = tiny_folder("llama")
    write_manifest(tmp_path / "skiplist.json", manifest_for(folder, every_third(folder)))
    return tmp_path / "skiplist.json"


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder("llama")
    model, _ = load_dynamic_4bit(manifest_for(folder, every_third(folder)), str(folder), "cpu")
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    return path


def test_export_prints_only_the_text_on_stdout_and_notes_on_stderr(qprobe: Run, manifest: Path):
    result = qprobe("export", manifest, "--to", "peft")
    assert result.exit_code == 0 and json.loads(result.stdout)["target_modules"]
    assert result.stderr.count("Note: ") == 2


def test_export_writes_a_file_with_the_same_text(qprobe: Run, manifest: Path, tmp_path: Path):
    printed = qprobe("export", manifest, "--to", "axolotl").stdout
    result = qprobe("export", manifest, "--to", "axolotl", "--out", tmp_path / "a.yaml")
    assert result.stdout == f"Written  {tmp_path / 'a.yaml'}\n"
    assert (tmp_path / "a.yaml").read_text() == printed
    wrapped = json.loads(qprobe("export", manifest, "--to", "axolotl", "--json").stdout)
    assert list(wrapped) == ["tool", "text", "notes", "layers_16bit"] and wrapped["text"] == printed


def test_export_of_a_bad_manifest_or_to_a_bad_place(qprobe: Run, manifest: Path, tmp_path: Path):
    assert "no such file" in explained(qprobe("export", tmp_path / "no.json", "--to", "peft"))
    nowhere = tmp_path / "no" / "a.json"
    assert "cannot be written" in explained(qprobe("export", manifest, "--to", "peft", "--out", nowhere))


@pytest.mark.parametrize(
    "arguments",
    [("export", "m.json"), ("export", "m.json", "--to", "ollama"), ("import", "c.json"), ("audit",)],
)
def test_wrong_usage(qprobe: Run, arguments: tuple[str, ...]):
    assert qprobe(*arguments).exit_code == 2


def test_import_says_what_matched_and_writes_a_manifest(qprobe: Run, tiny_folder: TinyFolder, tmp_path: Path):
    given, out = tmp_path / "list.json", tmp_path / "m.json"
    given.write_text(json.dumps(["lm_head", "mlp.down_proj", "merger"]))
    common = ("import", given, "--model", tiny_folder("llama"), "--out", out)
    result = qprobe(*common)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:3] == ["lm_head  1 layer", "mlp.down_proj  3 layers", "merger  nothing"]
    assert (
        "3 of 21 layers kept in 16-bit, besides lm_head, which standard 4-bit keeps too" in lines[3]
        and lines[4] == f"Skip-list  {out}"
    )
    assert "1 of 3 entries matches nothing in this model: 'merger'" in result.stderr
    data = json.loads(qprobe(*common, "--json").stdout)
    assert data["dead"] == ["merger"] and data["layers_16bit"] == list(read_manifest(out).skip_modules)


def test_an_exported_list_is_imported_as_the_same_layers(
    qprobe: Run, manifest: Path, tiny_folder: TinyFolder, tmp_path: Path
):
    exported, out = tmp_path / "config.json", tmp_path / "again.json"
    assert qprobe("export", manifest, "--to", "vllm", "--out", exported).exit_code == 1  # a split group
    assert qprobe("export", manifest, "--to", "transformers", "--out", exported).exit_code == 0
    assert qprobe("import", exported, "--model", tiny_folder("llama"), "--out", out).exit_code == 0
    assert read_manifest(out).skip_modules == read_manifest(manifest).skip_modules


def test_import_of_what_is_no_list(qprobe: Run, tiny_folder: TinyFolder):
    config = tiny_folder("llama") / "config.json"
    assert "no skip-list" in explained(qprobe("import", config, "--model", tiny_folder("llama")))


@pytest.mark.slow
def test_audit_of_a_sound_checkpoint(qprobe: Run, checkpoint: Path, manifest: Path):
    result = qprobe("audit", checkpoint, "--manifest", manifest, "--load", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "All clear: config, files, manifest and loaded model agree."
    data = json.loads(qprobe("audit", checkpoint, "--json").stdout)
    assert (data["ok"], data["layers_4bit"], data["layers_16bit"], data["loaded"]) == (True, 14, 8, False)


@pytest.mark.slow
def test_audit_of_a_stale_checkpoint_is_exit_code_1(qprobe: Run, checkpoint: Path, tmp_path: Path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["llm_int8_skip_modules"]
    (folder / "config.json").write_text(json.dumps(config))
    result = qprobe("audit", folder)
    assert result.exit_code == 1 and result.stdout.startswith("Wrong: 7 of 22 linears hold plain 16-bit data")
    assert "All clear" not in result.stdout and result.stderr == ""
    wrong = qprobe("audit", folder, "--json")
    assert wrong.exit_code == 1 and json.loads(wrong.stdout)["ok"] is False


def test_audit_of_no_checkpoint(qprobe: Run, checkpoint: Path, tmp_path: Path):
    assert "holds no config.json" in explained(qprobe("audit", tmp_path))
    assert "is no folder" in explained(qprobe("audit", tmp_path / "nowhere"))
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (folder / "model.safetensors").write_bytes(b"\x10")
    assert "is cut off" in explained(qprobe("audit", folder))
    assert qprobe("audit", checkpoint, "--device", "cpu").exit_code == 2
