"""The processor of a model: nothing invented, nothing lost, and a sentence for what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from transformers import BertConfig

from qprobe.errors import ModelError
from qprobe.loading.doctor import OPTIONAL_PACKAGES
from qprobe.loading.processor import load_processor
from qprobe.loading.source import Source, resolve

TinyFolder = Callable[[str], Path]


@pytest.mark.parametrize(
    ("said", "package"),
    [
        ("Package `num2words` is required to run SmolVLM processor. Install it.", "num2words"),
        ("\nQwen2VLVideoThing requires the Torchvision library but it was not found", "torchvision"),
        ("No module named 'timm'", "timm"),
    ],
)
def test_a_package_that_a_processor_needs_is_named(said: str, package: str, monkeypatch: pytest.MonkeyPatch):
    def lacking(*_: object, **__: object) -> None:
        raise ImportError(said)

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lacking)
    with pytest.raises(ModelError, match=f"needs {package} with .*pip install {package}"):
        load_processor(Source("model", "nowhere"))


def test_doctor_knows_the_packages_that_processors_need():
    assert {"torchvision", "num2words"} <= OPTIONAL_PACKAGES.keys()


def test_a_model_that_sees_is_no_text_model_where_its_image_processor_is_missing(
    tiny_folder: TinyFolder, tmp_path: Path
):
    folder = Path(copytree(tiny_folder("llava_pixtral"), tmp_path / "llava"))
    given = json.loads((folder / "processor_config.json").read_text())
    del given["image_processor"]
    (folder / "processor_config.json").write_text(json.dumps(given))
    with pytest.raises(ModelError, match=r"a LlavaProcessor, cannot be loaded .* reads no images"):
        load_processor(resolve(str(folder)))


def test_no_tokenizer_is_made_of_no_files(tmp_path: Path):
    BertConfig().save_pretrained(tmp_path / "bert")
    assert load_processor(resolve(str(tmp_path / "bert"))) is None


def test_arguments_of_the_processor_survive_where_its_video_half_is_left_out(
    tiny_folder: TinyFolder, tmp_path: Path
):
    folder = Path(copytree(tiny_folder("qwen2_vl"), tmp_path / "qwen"))
    given = {"processor_class": "Qwen2VLProcessor", "chat_template": "{{ 'kept' }}"}
    (folder / "processor_config.json").write_text(json.dumps(given))
    assert load_processor(resolve(str(folder))).chat_template == "{{ 'kept' }}"
