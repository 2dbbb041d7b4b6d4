"""The processor of a model: nothing invented, nothing lost, and a sentence for what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from transformers import BertConfig, Gemma4Config

from qprobe.errors import ModelError
from qprobe.loading.doctor import OPTIONAL_PACKAGES
from qprobe.loading.processor import load_processor
from qprobe.loading.source import Source, explained, resolve
from tests import sequences
from tests.benchmarks.architecture_matrix.images import Parts

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


def test_a_processor_without_its_video_half_has_none_for_sound_either(tmp_path: Path):
    Gemma4Config().save_pretrained(tmp_path)
    Parts("gemma4").save_pretrained(tmp_path)
    found = load_processor(resolve(str(tmp_path)))
    assert type(found).__name__ == "Gemma4Processor" and found.feature_extractor is None
    assert found.image_processor.max_soft_tokens == 70


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{}",
        '{"version": "1.0", "model": 7}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
        "[" * 100_000,
        "\x00",
    ],
)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_of_a_tokenizer_is_one_sentence(
    file: str, content: str, tiny_folder: TinyFolder, tmp_path: Path
):
    folder = Path(copytree(tiny_folder("llama"), tmp_path / "llama"))
    (folder / file).write_text(content)
    try:
        load_processor(resolve(str(folder)))  # some of them say nothing, and then nothing is broken
    except ModelError as error:
        assert "'llama'" in str(error) and "\n" not in str(error)
    else:
        assert file == "tokenizer_config.json"


def test_a_panic_of_tokenizers_is_one_sentence_and_other_ends_pass():
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ModelError, match=r"'model' cannot be loaded: called `Option::unwrap\(\)`"):
        with explained(Source("model", "nowhere")):
            raise panic("called `Option::unwrap()` on a `None` value")
    with pytest.raises(KeyboardInterrupt), explained(Source("model", "nowhere")):
        raise KeyboardInterrupt


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_pipe_or_a_device_in_a_models_folder_is_refused_before_it_is_opened(
    file: str, tiny_folder: TinyFolder, tmp_path: Path
):
    folder = Path(copytree(tiny_folder("llama"), tmp_path / "llama"))
    (folder / file).unlink()
    os.mkfifo(folder / file)
    (folder / "socket").symlink_to("/dev/zero")  # no file that a model is read from
    if file == "config.json":
        (folder / "a.json").symlink_to("/dev/zero")
    what = r"a\.json cannot be read \(it is a device" if file == "config.json" else r"\(it is a pipe"
    with pytest.raises(ModelError, match=what):
        resolve(str(folder))


def test_a_tokenizer_and_an_image_processor_that_no_file_joins_are_a_pair(tmp_path: Path):
    recipe = sequences.RECIPES["trocr"]
    recipe.config().save_pretrained(tmp_path)
    (made,) = recipe.processor()
    made.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"a TrOCRProcessor, cannot be loaded .* reads no images"):
        load_processor(resolve(str(tmp_path)))
    made.image_processor.save_pretrained(tmp_path)
    found = load_processor(resolve(str(tmp_path)))
    assert found.image_processor.size == made.image_processor.size
    assert found.tokenizer.get_vocab() == made.tokenizer.get_vocab()
