"""Code that a checkpoint brings runs only where it is trusted, and nothing asks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.plan import plan
from qprobe.cli import main
from qprobe.errors import ModelError
from qprobe.loading.processor import load_processor
from qprobe.loading.reference import load_reference
from qprobe.loading.source import resolve

TinyFolder = Callable[[str], Path]
FILES = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoImageProcessor",
    "AutoTokenizer",
)
COMMANDS = ("scan", "compare", "quantize", "audit", "finetune", "plan", "import")


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("the terminal was asked")

    monkeypatch.setattr("builtins.input", asked)


def planted(folder: Path, out: Path, **config: Any) -> tuple[Path, Path]:
    """(model, marker): the model of `folder` with code in each of its configs, which would write `marker`."""
    copytree(folder, out)
    marker = out.with_name("marker")
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    code += "".join(f"class Planted{x}:\n    pass\n" for x in CLASSES)
    (out / "planted.py").write_text(code)
    (out / "custom_generate").mkdir()
    (out / "custom_generate" / "generate.py").write_text(code + "def generate(*_, **__):\n    pass\n")
    mapped: dict[str, Any] = {x: f"planted.Planted{x}" for x in CLASSES}
    for name in FILES:
        path = out / name
        if not path.exists():
            continue
        given = json.loads(path.read_text())
        auto_map = dict(mapped)
        if name == "tokenizer_config.json":
            auto_map["AutoTokenizer"] = ["planted.PlantedAutoTokenizer", None]
        more = config if name == "config.json" else {}
        path.write_text(json.dumps({**given, "auto_map": auto_map, **more}))
    return out, marker


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "llava_pixtral", "bert"])
def test_code_of_a_model_that_transformers_has_is_not_run_and_that_is_said_once(
    name: str, tiny_folder: TinyFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model, marker = planted(tiny_folder(name), tmp_path / f"planted-{name}")
    with caplog.at_level(logging.WARNING):
        reference = load_reference(str(model), "cpu")
        plan(str(model))
        audit(model, load=True, device="cpu")
    assert not marker.exists()
    plain = load_processor(resolve(str(tiny_folder(name))))
    assert type(reference.processor).__name__ == type(plain).__name__
    assert len([x for x in caplog.messages if "auto_map in config.json" in x]) == 1


def test_a_model_that_exists_only_as_code_is_refused_in_a_sentence(tiny_folder: TinyFolder, tmp_path: Path):
    model, marker = planted(tiny_folder("llama"), tmp_path / "model", model_type="planted")
    for load in (plan, load_reference, audit):
        with pytest.raises(
            ModelError, match=r"exists only as code .* pass --trust-remote-code if you trust it"
        ):
            load(str(model))
    assert not marker.exists()


def test_a_tokenizer_that_exists_only_as_code_is_refused_in_a_sentence(
    tiny_folder: TinyFolder, tmp_path: Path
):
    model, marker = planted(tiny_folder("llama"), tmp_path / "model")
    (model / "tokenizer.json").unlink()
    given = {
        "tokenizer_class": "Planted",
        "auto_map": {"AutoTokenizer": ["planted.PlantedAutoTokenizer", None]},
    }
    (model / "tokenizer_config.json").write_text(json.dumps(given))
    with pytest.raises(ModelError, match="tokenizer of 'model' exists only as code"):
        load_processor(resolve(str(model)))
    assert not marker.exists()


def test_a_processor_of_code_gives_way_to_that_of_transformers(tiny_folder: TinyFolder, tmp_path: Path):
    model, marker = planted(tiny_folder("llava_pixtral"), tmp_path / "model")
    given = json.loads((model / "processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps({**given, "processor_class": "Planted"}))
    assert type(load_processor(resolve(str(model)))).__name__ == "LlavaProcessor"
    assert not marker.exists()


def test_trusted_code_runs(tiny_folder: TinyFolder, tmp_path: Path):
    model, marker = planted(tiny_folder("llama"), tmp_path / "model", model_type="planted")
    with pytest.raises(Exception):  # noqa: B017  # the planted class is no config
        plan(str(model), trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_has_the_option_and_says_what_it_risks(command: str):
    options: dict[str, Any] = {x.name or "": x for x in main.commands[command].params}
    assert "whatever you can" in options["trust_remote_code"].help
