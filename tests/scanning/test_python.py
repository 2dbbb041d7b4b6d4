"""A scan from Python: of a loaded model, which stays as it was, and of data in memory."""

from __future__ import annotations

import copy
import inspect
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image

import qprobe
from qprobe.errors import ModelError, QprobeError, SampleError
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from qprobe.options import ScanOptions, takes
from qprobe.scanning.asked.given import images_or_rows
from qprobe.scanning.asked.recorded import scan_call
from tests import tiny
from tests.scanning.asked import Scanned, TinyFolder, options

FEW = {"samples": 6, "max_new_tokens": 5}
OF_IMAGES: dict[str, Any] = {"prompt": "what is it?", "samples": 4, "nodes": 1}


def loaded(folder: Path, **changes: Any) -> tuple[Any, Any]:
    """(model, processor) as a user loads them."""
    architecture = tiny.RECIPES[folder.name].architecture
    model = getattr(transformers, architecture).from_pretrained(folder, **{"dtype": "auto", **changes})
    return model, load_processor(resolve(str(folder)))


def state(model: Any) -> dict[str, Any]:
    """All that a scan could change of a model, tensors as copies."""
    return {
        "tensors": {k: (v.dtype, v.device, v.clone()) for k, v in model.state_dict().items()},
        "storage": {k: v.data_ptr() for k, v in model.state_dict().items()},
        "buffers": {k: v.clone() for k, v in model.named_buffers()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in model.named_modules()},
        "hooks": {
            k: [dict(v) for name, v in sorted(vars(m).items()) if name.endswith("_hooks")]
            for k, m in model.named_modules()
        },
        "forwards": {k: m.__dict__.get("forward") for k, m in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "process": process_state(),
    }


def process_state() -> dict[str, Any]:
    """What a process has one of, and a scan could leave otherwise for whatever the user does next."""
    numpys = np.random.get_state(legacy=False)["state"]["key"].tolist()
    return {
        "random": [hash(str(x)) for x in (torch.get_rng_state().tolist(), random.getstate(), numpys)],
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "verbosity": transformers.logging.get_verbosity(),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - {"tensors", "buffers"}:
        assert one[name] == other[name], name
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, (dtype, device, values) in one["tensors"].items():
        assert (dtype, device) == other["tensors"][name][:2]
        assert torch.equal(values, other["tensors"][name][2]), name
    assert all(torch.equal(v, other["buffers"][k]) for k, v in one["buffers"].items())


def written(model: Any, processor: Any, **how: Any) -> str:
    """The model's answer to a text, greedy if `how` does not say otherwise."""
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = tokenizer("what does the image show?", return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=12,
        **{"do_sample": False, **how},
    )
    return tokenizer.decode(output[0])


def at_random(model: Any, processor: Any) -> str:
    """An answer that is drawn, always the same one."""
    torch.manual_seed(3)
    return written(model, processor, do_sample=True, temperature=5.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_tied", "qwen2_vl"])
def test_a_loaded_model_gives_the_table_of_its_folder_and_stays_as_it_was(
    name: str, scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path
):
    model, processor = loaded(tiny_folder(name), attn_implementation="eager")
    model.train()
    next(model.parameters()).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda *_: None)
    said, drawn = written(model, processor), at_random(model, processor)
    before = state(model)

    found = qprobe.scan(model, processor=processor, out=tmp_path / "run", **FEW)

    wanted = scanned(name).run
    assert (found.path / "layers.csv").read_bytes() == (wanted / "layers.csv").read_bytes()
    assert_same(state(model), before)
    assert (written(model, processor), at_random(model, processor)) == (said, drawn)


@pytest.mark.slow
def test_a_model_in_32_bit_is_measured_in_16_bit_and_stays_in_32(
    scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path
):
    model, processor = loaded(tiny_folder("llama"), dtype=torch.float32)
    before = state(model)
    found = qprobe.scan(model, processor=processor, out=tmp_path / "run", **FEW)
    assert (found.path / "layers.csv").read_bytes() == (scanned("llama").run / "layers.csv").read_bytes()
    assert_same(state(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["answers", "measure"])
def test_a_loaded_model_stays_as_it_was_where_a_scan_breaks_off(
    error: type[BaseException], place: str, tiny_folder: TinyFolder, tmp_path: Path
):
    model, processor = loaded(tiny_folder("llama_tied"))
    before = state(model)

    def progress(stage: str, done: int, total: int) -> None:
        if stage == place:
            raise error

    with pytest.raises(error):
        qprobe.scan(model, processor=processor, out=tmp_path / "run", progress=progress, **FEW)
    assert_same(state(model), before)


@pytest.mark.slow
def test_breaking_off_inside_a_forward_pass_leaves_the_model_as_it_was(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, processor = loaded(tiny_folder("llama"))
    before = state(model)

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qprobe.measure.outputs.OutputErrors.forward", broken)
    with pytest.raises(KeyboardInterrupt):
        qprobe.scan(model, processor=processor, out=tmp_path / "run", **FEW)
    assert_same(state(model), before)


@pytest.mark.slow
def test_its_manifest_names_no_folder_and_loading_it_asks_for_the_model(
    tiny_folder: TinyFolder, tmp_path: Path
):
    folder = tiny_folder("llama")
    model, processor = loaded(folder)
    found = qprobe.scan(model, processor=processor, out=tmp_path / "run", **FEW)
    files = [found.path / "scan.json", found.path / "skiplist.json"]
    assert all(str(folder.parent) not in x.read_text() for x in files)
    manifest = json.loads(files[1].read_text())
    assert manifest["model"]["id"] == "LlamaForCausalLM"
    made = "qprobe.scan(model, processor=processor, samples=6, max_new_tokens=5, budget='+10%')"
    assert manifest["made_by"]["command"] == f"{made}  # model: a loaded LlamaForCausalLM"

    with pytest.raises(ModelError, match="Pass model="):
        qprobe.load_dynamic_4bit(files[1], device="cpu")
    with pytest.raises(ModelError, match="Pass model="):
        qprobe.quantize(files[1], tmp_path / "out", device="cpu")
    with pytest.raises(ModelError, match="Pass model="):
        qprobe.compare(files[1], device="cpu")
    small, _ = qprobe.load_dynamic_4bit(files[1], model=str(folder), device="cpu")
    assert qprobe.verify(small, qprobe.read_manifest(files[1])) is None


@pytest.mark.parametrize("rows", [pd.DataFrame({"prompt": ["a", "b"]}), np.zeros((2, 4, 4, 3), np.uint8)])
def test_rows_that_compare_to_no_truth_value_are_recorded_as_rows(rows: Any):
    asked = ScanOptions("acme/m", data=rows, samples=6)
    assert scan_call(asked, "acme/m", "") == "qprobe.scan('acme/m', data=rows, samples=6, budget='+10%')"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"measures": ["weight"]}, "reads the files of a checkpoint"),
        ({"max_memory": "1GiB"}, "lets weights wait"),
        ({"device": "auto"}, "spreads a model over GPUs"),
        ({"processor": None}, "Pass processor="),
    ],
)
def test_what_a_loaded_model_cannot_be_asked_is_said(
    changes: dict[str, Any], said: str, tiny_folder: TinyFolder, tmp_path: Path
):
    model, processor = loaded(tiny_folder("llama"))
    asked = {"processor": processor, "out": tmp_path / "run", **FEW, **changes}
    with pytest.raises(QprobeError, match=said):
        qprobe.scan(model, **asked)
    assert not (tmp_path / "run").exists()


def test_an_option_that_is_unknown_is_a_type_error_with_the_nearest_name():
    with pytest.raises(TypeError, match=r"scan has no option 'buget'. Did you mean budget\?"):
        qprobe.scan("demo", **{"buget": "+5%"})
    assert "budget" in inspect.signature(qprobe.scan).parameters

    @dataclass(frozen=True)
    class One:
        model: str
        budget: str = ""

    def joined(options: One) -> str:
        return options.model + options.budget

    with pytest.raises(TypeError, match="Its options are model, budget"):
        takes(One)(joined)("x", **{"zzz": 1})  # pyright: ignore[reportCallIssue]
    assert takes(One)(joined)("x", budget="y") == "xy"


def broken_rows() -> Iterator[dict[str, str]]:
    yield {"prompt": "what is this?"}
    raise ValueError("the disk is\nfull")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"data": []}, "no rows"),
        ({"images": []}, "no rows"),
        ({"data": broken_rows()}, r"stopped after 1 row with ValueError \(the disk is full\)"),
        ({"data": 3}, "int"),
        ({"images": 3}, "images is a int"),
        ({"images": [np.zeros((4, 4, 3), np.uint8)], "data": [{"prompt": "x"}]}, "Both images and data"),
        ({"data": [{"prompt": "x"}], "processor": str}, "processor goes with a loaded model"),
    ],
)
def test_wrong_input_is_said_in_a_sentence(
    given: dict[str, Any], said: str, tiny_folder: TinyFolder, tmp_path: Path
):
    with pytest.raises(QprobeError, match=said):
        qprobe.scan(**options(tiny_folder("llama"), tmp_path / "run", **given))


def pictures(count: int) -> list[bytes]:
    return [tiny.picture(seed) for seed in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Pillow", "arrays", "paths", "rows", "iterator", "Dataset"])
def test_images_in_memory_give_the_table_of_their_folder(
    kind: str, tiny_folder: TinyFolder, tmp_path: Path, scanned_images: Path
):
    opened = [Image.open(io.BytesIO(x)) for x in pictures(4)]
    if kind == "Pillow":
        given: dict[str, Any] = {"images": opened}
    elif kind == "arrays":
        given = {"images": [np.asarray(x) for x in opened]}
    elif kind == "paths":
        given = {"images": sorted((scanned_images.parent / "images").iterdir())}
    else:
        rows = [{"image": x, "prompt": "what is it?"} for x in opened]
        given = {"data": iter(rows) if kind == "iterator" else rows}
        if kind == "Dataset":
            from datasets import Dataset

            given = {"data": Dataset.from_list(rows)}
    asked = options(tiny_folder("qwen2_vl"), tmp_path / "run", **OF_IMAGES, **given)
    found = qprobe.scan(**asked)
    ours, theirs = (pd.read_csv(x / "layers.csv") for x in (found.path, scanned_images))
    # Which half of the samples has isolated KL is decided by the bytes of their files, which are new here.
    other = [] if kind == "paths" else ["isolated_kl", "isolated_kl_se"]
    pd.testing.assert_frame_equal(ours.drop(columns=other), theirs.drop(columns=other), check_exact=True)


@pytest.fixture(scope="module")
def scanned_images(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a scan of a folder of four images, which lies beside it."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "images").mkdir()
    for number, data in enumerate(pictures(4)):
        (folder / "images" / f"{number}.png").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qprobe.scanning.finish.write_report", lambda _run: [])
        asked = options(tiny_folder("qwen2_vl"), folder / "run", images=folder / "images", **OF_IMAGES)
        return qprobe.scan(**asked).path


def test_one_image_and_a_stack_of_images_are_lists_of_them():
    array = np.zeros((3, 4, 4, 3), np.uint8)
    for one in (array[0], Image.fromarray(array[0])):
        _, rows = images_or_rows(one, None)
        assert len(list(rows)) == 1
    assert len(list(images_or_rows(array, None)[1])) == 3
    assert images_or_rows("photos", None) == (Path("photos"), None)
    with pytest.raises(SampleError, match="Both"):
        images_or_rows([], [])
