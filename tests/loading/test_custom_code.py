"""Code that a checkpoint brings runs only where it is trusted, and nothing asks."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from click.testing import CliRunner

from qprobe.checkpoint.adapters.lora import read_adapter
from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.plan import plan
from qprobe.cli import main
from qprobe.data.reading import read_conversations
from qprobe.errors import ModelError, QprobeError, RunError
from qprobe.loading.processor import load_processor
from qprobe.loading.reference import load_reference
from qprobe.loading.source import resolve
from qprobe.manifest.write import write_manifest
from qprobe.training.origin import load_finetuned
from tests import tiny
from tests.checkpoint.manifests import every_third, manifest_for

TinyFolder = Callable[[str], Path]
# All that transformers looks for beside weights (`transformers.utils`, `.hub`), and peft.
CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "modelcard.json",
)
ALSO_MADE = ("video_preprocessor_config.json", "generation_config.json")  # where a model has none
CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoImageProcessor",
    "AutoVideoProcessor",
    "AutoFeatureExtractor",
    "AutoTokenizer",
)
PICKLES = (
    "pytorch_model.bin",
    "model.pt",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "tokenizer.pkl",
    "dataset.pkl",
)
MODULES = ("planted", "modeling_llama", "configuration_llama", "handler", "sitecustomize", "__init__")
COMMANDS = ("scan", "compare", "quantize", "audit", "finetune", "plan", "import")


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("the terminal was asked")

    monkeypatch.setattr("builtins.input", asked)


class Touching:
    """Its pickle touches a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def planted(folder: Path, out: Path, **config: Any) -> tuple[Path, Path]:
    """(model, marker): the model of `folder` with code in each of its configs, which would write `marker`."""
    copytree(folder, out)
    marker = out.with_name("marker")
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    code += "".join(f"class Planted{x}:\n    pass\n" for x in CLASSES)
    for name in MODULES:
        (out / f"{name}.py").write_text(code)
    for name in PICKLES:
        (out / name).write_bytes(pickle.dumps(Touching(marker)))
    (out / "custom_generate").mkdir()
    (out / "custom_generate" / "generate.py").write_text(code + "def generate(*_, **__):\n    pass\n")
    mapped: dict[str, Any] = {x: f"planted.Planted{x}" for x in CLASSES}
    for name in CONFIGS:
        path = out / name
        if not path.exists() and name not in ALSO_MADE:
            continue
        given = json.loads(path.read_text()) if path.exists() else {}
        auto_map = dict(mapped)
        if name == "tokenizer_config.json":
            auto_map["AutoTokenizer"] = ["planted.PlantedAutoTokenizer", None]
        more = config if name == "config.json" else {}
        path.write_text(json.dumps({**given, "auto_map": auto_map, **more}))
    return out, marker


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_no_command_runs_code_of_a_model_of_its_data_or_of_its_adapter(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, marker = planted(tiny_folder("qwen2_vl"), tmp_path / "planted")
    monkeypatch.chdir(model)  # where its modules can be imported, and its pickles found
    monkeypatch.syspath_prepend(str(model))
    write_manifest(tmp_path / "skiplist.json", manifest_for(model, every_third(model)))
    (tmp_path / "a.png").write_bytes(tiny.picture(0))
    row = {"image": "a.png", "prompt": "What?", "answer": "a cat"}
    rows = [{**row, "prompt": f"What is {i}?"} for i in range(6)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    m, d, out = f"--model {model} --device cpu", f"--data {tmp_path}/d.jsonl", tmp_path
    for line in (
        f"scan {m} {d} --measures activation --out {out}/run",
        f"scan --model {model} --measures weight --out {out}/weights --device cpu",
        f"plan --model {model} --training",
        f"compare --manifest {out}/skiplist.json {m} {d} --samples 2 --max-new-tokens 2",
        f"quantize {out}/skiplist.json {m} --out {out}/quantized",
        f"audit {out}/quantized --load --device cpu",
        f"import {out}/quantized/config.json --model {model} --out {out}/imported.json",
        f"finetune {out}/skiplist.json {m} {d} --out {out}/adapter --steps 2 --rank 2 --accumulation 1",
        f"merge {out}/adapter {m} --out {out}/merged",
    ):
        done = CliRunner().invoke(main, line.split())
        assert done.exit_code == 0, (line, done.stderr, done.exception)
    assert not marker.exists()
    # The pickle beside it is all that is left.
    for folder, name in ((tmp_path / "adapter", "adapter_model"), (model, "model")):
        (folder / f"{name}.bin").write_bytes(pickle.dumps(Touching(marker)))
        (folder / f"{name}.safetensors").unlink()
        with pytest.raises(QprobeError, match=r"pickles are not read|a pickle, which qprobe does not read"):
            load_finetuned(tmp_path / "adapter", str(model), "cpu")
    with pytest.raises(ModelError, match="a pickle, which qprobe does not read"):
        load_reference(str(model), "cpu")
    assert not marker.exists()


def test_an_adapter_beside_a_model_is_refused_and_one_that_names_a_module_too(
    tiny_folder: TinyFolder, tmp_path: Path
):
    model, marker = planted(tiny_folder("llama"), tmp_path / "model")
    named = {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "planted"}
    (model / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(ModelError, match="beside its model, which transformers would put into it"):
        resolve(str(model))
    with pytest.raises(
        RunError, match=r"names the Python module 'planted' \(megatron_core\), which would be"
    ):
        read_adapter(model)
    assert not marker.exists()


@pytest.mark.parametrize(
    "at",
    [
        {"attn_implementation": "owner/kernel"},
        {"text_config": {"experts_implementation": {"": "owner/kernel@1"}}},
    ],
)
def test_a_config_that_wants_a_kernel_of_the_hub_is_refused(
    at: dict[str, Any], tiny_folder: TinyFolder, tmp_path: Path
):
    model, _ = planted(tiny_folder("llama"), tmp_path / "model", **at)
    with pytest.raises(ModelError, match=r"wants a kernel of the hub \('owner/kernel"):
        plan(str(model))


def test_a_data_set_of_the_hub_is_never_loaded_by_its_script(monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("datasets.load_dataset", lambda _, **named: asked.append(named) or {})
    with pytest.raises(QprobeError):
        read_conversations("owner/name")
    assert asked == [{"trust_remote_code": False}]  # what the versions before 4 ask for, and 4 on refuses


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
