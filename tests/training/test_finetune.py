"""A fine-tuning run learns, says what it did, goes on where it stopped, and trains on nothing unnamed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from qprobe.cli import main
from qprobe.data.reading import read_conversations
from qprobe.errors import LeftOutWarning, MachineError, ManifestError, QprobeError, RunError, SampleError
from qprobe.inputs.encoding import encode_conversations
from qprobe.manifest.read import read_manifest
from qprobe.manifest.write import write_manifest
from qprobe.options import FinetuneOptions, Progress, no_progress
from qprobe.training import collate
from qprobe.training import finetune as library
from qprobe.training.origin import load_finetuned
from qprobe.training.result import Finetuned
from tests import tiny
from tests.checkpoint.manifests import every_third, manifest_for

pytestmark = pytest.mark.slow

BASES = ("16-bit", "nf4", "dynamic")


def finetune(asked: FinetuneOptions, progress: Progress = no_progress) -> Finetuned:
    return library.finetune(**{**vars(asked), "progress": progress})


@pytest.fixture
def asked(tiny_folder: Any, tmp_path: Path) -> FinetuneOptions:
    """A run on the tiny Mllama: five lines, all with one answer, three steps of two lines."""
    folder = tiny_folder("mllama")
    write_manifest(tmp_path / "skiplist.json", manifest_for(folder, every_third(folder)))
    write_data(tmp_path / "train.jsonl", 5)
    return FinetuneOptions(
        tmp_path / "skiplist.json", data=tmp_path / "train.jsonl", out=tmp_path / "out", model=str(folder),
        device="cpu", steps=4, accumulation=2, learning_rate=2e-2, rank=4, max_length=128, save_every=2,
    )  # fmt: skip


def write_data(path: Path, count: int, *more: str) -> None:
    lines = []
    for number in range(count):
        (path.parent / f"{number}.png").write_bytes(tiny.picture(number))
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a coastal train"}]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    path.write_text("\n".join([*lines, *more]), "utf-8")


@pytest.mark.parametrize("base", BASES)
def test_it_learns_on_every_base_and_the_adapter_loads_as_it_was(base, asked):
    options = replace(asked, base=base, steps=8)
    done = finetune(options)
    assert (done.steps, done.trained_lines, done.held_out_lines, done.optimizer) == (8, 4, 1, "adamw_torch")
    assert done.eval_loss < 0.7 * done.eval_loss_before
    assert [step for step, _ in done.eval_history] == [0, 2, 4, 6, 8]
    tuned, processor = load_finetuned(options.out, device="cpu")
    losses = []
    for row in read_conversations(options.data).good:
        with torch.no_grad():
            losses.append(float(tuned(**encode_conversations(processor, [row], torch.bfloat16)).loss))
    assert any(loss == pytest.approx(done.eval_loss, rel=1e-6) for loss in losses)  # one of them was held out


def test_the_record_names_the_model_and_no_other_folder_of_this_machine(asked):
    done = finetune(asked)
    manifest = read_manifest(asked.manifest)
    record = json.loads((asked.out / "finetune.json").read_text())
    assert record["status"] == "finished"
    assert record["fingerprint"] == done.fingerprint == manifest.model.fingerprint
    assert record["result"]["eval_loss"] == done.eval_loss and record["spec"]["rank"] == 4
    assert read_manifest(asked.out / "skiplist.json") == manifest
    assert not (asked.out / "checkpoints").exists()
    config = json.loads((asked.out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == record["model"] == str(asked.model)
    for name in ("finetune.json", "adapter_config.json", "README.md"):
        assert str(asked.out.parent) not in (asked.out / name).read_text()
    shapes = {n: tuple(t.shape) for n, t in load_file(asked.out / "adapter_model.safetensors").items()}
    assert shapes and all(4 in shape for shape in shapes.values())
    assert not any("vision_model" in name for name in shapes)
    assert sum(a * b for a, b in shapes.values()) == done.trainable_parameters


def test_an_interrupted_run_goes_on_and_ends_at_the_same_bits(asked, tmp_path):
    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "train" and done == 3:  # the checkpoint of step 2 is there, step 3 is lost
            raise KeyboardInterrupt

    whole = finetune(replace(asked, out=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        finetune(asked, stop)
    (asked.out / "checkpoints" / "checkpoint-3").mkdir()  # as a run killed while it was saving leaves it
    resumed = finetune(asked)
    assert (resumed.resumed_from, whole.resumed_from) == (2, None)
    assert resumed.history == whole.history and resumed.eval_history == whole.eval_history
    first, second = (load_file(x / "adapter_model.safetensors") for x in (tmp_path / "whole", asked.out))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_a_run_does_not_go_on_with_other_weights_of_the_same_shapes(asked, tmp_path):
    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(asked, stop)
    other = Path(copytree(asked.model, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({n: 1.3 * t for n, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"asked for otherwise \(base_weights\)"):
        finetune(replace(asked, model=str(other)))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "llava_pixtral"])
def test_lines_with_and_without_an_image_train_in_batches_of_three(name, asked, tiny_folder):
    folder = tiny_folder(name)
    write_manifest(asked.manifest, manifest_for(folder, every_third(folder)))
    text = json.dumps({"prompt": "which one is larger?", "answer": "seven"})
    write_data(asked.data, 3, text, text, text)
    done = finetune(replace(asked, model=str(folder), batch_size=3, accumulation=1, held_out=0.0))
    assert (done.trained_lines, done.skipped) == (6, ())
    assert done.history[-1][1] < done.history[0][1]


def test_lines_with_and_without_an_image_cannot_share_a_batch(asked, monkeypatch):
    plain = json.dumps(
        {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]}
    )
    write_data(asked.data, 5, plain, plain)
    with monkeypatch.context() as patch, pytest.raises(SampleError, match="cannot mix both kinds"):
        patch.setattr("qprobe.training.finetune.open_base", None)  # no weight is read for it
        finetune(replace(asked, batch_size=2))
    assert not asked.out.exists()
    assert finetune(replace(asked, steps=1)).steps == 1  # one at a time they can


def test_a_folder_with_something_else_is_left_alone(asked):
    asked.out.mkdir()
    (asked.out / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no run"):
        finetune(asked)
    (asked.out / "notes.txt").unlink()
    finetune(replace(asked, steps=1))
    with pytest.raises(RunError, match="finished adapter"):
        finetune(replace(asked, steps=1))
    record = json.loads((asked.out / "finetune.json").read_text())
    (asked.out / "finetune.json").write_text(json.dumps({**record, "status": "running"}))
    checkpoint = asked.out / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(RunError, match=r"asked for otherwise \(rank, steps\)"):
        finetune(replace(asked, rank=8, steps=2))
    with pytest.raises(RunError, match="no finished adapter"):
        load_finetuned(asked.out, asked.model, "cpu")


def test_an_adapter_beside_another_models_manifest_is_refused(asked, tiny_folder):
    finetune(replace(asked, steps=1))
    write_manifest(asked.out / "skiplist.json", manifest_for(tiny_folder("llama")))
    with pytest.raises(ManifestError, match="fingerprint"):
        load_finetuned(asked.out, str(tiny_folder("llama")), "cpu")
    (asked.out / "skiplist.json").unlink()
    with pytest.raises(
        ManifestError, match=r"has no skiplist\.json, which belongs to its adapter\. Copy it again"
    ):
        load_finetuned(asked.out, asked.model, "cpu")


def test_many_bad_lines_are_refused_before_a_model_loads_and_few_are_skipped_by_name(asked, monkeypatch):
    long = json.dumps(
        {"conversations": [{"from": "human", "value": "a " * 200}, {"from": "gpt", "value": "b"}]}
    )
    write_data(asked.data, 4, *['{"image": "0.png", "conv'] * 10, long)
    with monkeypatch.context() as patch:
        patch.setattr("qprobe.training.finetune.open_base", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(
            SampleError, match=r"10 of 15 lines.*line 5: .* not a complete JSON object.*--bad-data skip"
        ):
            finetune(asked)
    assert not asked.out.exists()
    skipping = replace(asked, bad_data="skip", steps=1, out=asked.out.with_name("skipping"))
    with pytest.warns(
        LeftOutWarning, match=r"Left out: 11 of 15 lines of train\.jsonl\. The first: .* line 5"
    ):
        done = finetune(skipping)
    assert (done.trained_lines, done.held_out_lines, len(done.skipped)) == (3, 1, 11)
    write_data(asked.data, 4, '{"image": "0.png", "conv', long.replace("{", '{"source": "coco", ', 1))
    with pytest.warns(LeftOutWarning, match=r"Left out: 2 of 6 lines"):
        done = finetune(replace(asked, steps=1))
    assert done.notes == ("train.jsonl: not used are the fields source.",)
    assert (done.trained_lines, done.held_out_lines) == (3, 1)
    assert [x.split(":")[0] for x in done.skipped] == ["train.jsonl line 5", "train.jsonl line 6"]
    assert "tokens, more than --max-length 128" in done.skipped[1]


def test_a_line_too_long_for_the_model_is_refused_too(asked):
    with pytest.raises(SampleError, match=r"train\.jsonl line 1: it has \d+ tokens"):
        finetune(replace(asked, max_length=10))
    assert not asked.out.exists()


def test_a_file_to_evaluate_on_takes_the_place_of_the_split(asked, tmp_path):
    write_data(tmp_path / "eval.jsonl", 2)
    done = finetune(replace(asked, eval_data=tmp_path / "eval.jsonl", steps=1))
    assert (done.trained_lines, done.held_out_lines) == (5, 2)
    nothing = finetune(replace(asked, held_out=0.0, steps=1, out=tmp_path / "none"))
    assert (nothing.trained_lines, nothing.held_out_lines, nothing.eval_loss) == (5, 0, None)


def test_vision_adapters_on_request(asked):
    finetune(replace(asked, adapt="all", steps=1))
    names = load_file(asked.out / "adapter_model.safetensors").keys()
    assert any("vision_model" in name for name in names) and not any("lm_head" in name for name in names)


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_folder_free(asked):
    with pytest.raises(QprobeError, match=r"became (nan|inf) at step \d.* last good loss was .* at step \d"):
        finetune(replace(asked, learning_rate=1e30, held_out=0.0, save_every=1))
    assert finetune(replace(asked, steps=1)).resumed_from is None


def test_an_adapter_that_the_last_step_broke_is_no_success(asked, monkeypatch):
    step = torch.optim.AdamW.step

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = step(self, *args, **kwargs)
        self.param_groups[0]["params"][-1].data.fill_(float("nan"))
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    said = r"lora_\w.* is not finite after the last step, .* last good loss was .*, at step 1\."
    with pytest.raises(QprobeError, match=said):
        finetune(replace(asked, held_out=0.0, steps=1))
    with pytest.raises(QprobeError, match=r"The loss on the held-out lines became nan at step 1"):
        finetune(replace(asked, steps=1))


def test_an_option_that_fails_does_not_claim_the_folder(asked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("qprobe.training.finetune.make_trainer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(replace(asked, rank=2))
    assert finetune(replace(asked, rank=3, steps=1)).steps == 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("epochs", float("nan"), "--epochs nan"),
        ("epochs", float("inf"), "--epochs inf"),
        ("epochs", 0.0, "--epochs 0"),
        ("epochs", -1.0, "--epochs -1"),
        ("learning_rate", float("nan"), "--learning-rate nan"),
        ("learning_rate", 0.0, "--learning-rate 0"),
        ("held_out", float("nan"), "--held-out nan"),
        ("steps", 0, "--steps 0"),
        ("rank", 100_000, r"--rank 100,000 is higher .* which is 64 at most"),
    ],
)
def test_numbers_that_make_no_run_are_refused_before_a_model_loads(option, value, said, asked, monkeypatch):
    monkeypatch.setattr("qprobe.training.finetune.open_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(QprobeError, match=said):
        finetune(replace(asked, **{option: value}))
    assert not asked.out.exists()


def test_a_batch_that_memory_does_not_hold_is_halved_and_learns_the_same(asked, tmp_path, monkeypatch):
    small = finetune(replace(asked, out=tmp_path / "small", batch_size=1, accumulation=2, steps=2))
    real = collate.encode_conversations

    def short(processor: Any, rows: Any, dtype: Any, decoder: Any) -> Any:
        if len(rows) > 1:
            raise MemoryError
        return real(processor, rows, dtype, decoder)

    monkeypatch.setattr(collate, "encode_conversations", short)
    done = finetune(replace(asked, batch_size=2, accumulation=1, steps=2))
    assert done.history == small.history and done.other_batches[0].startswith("Memory did not suffice")
    one, other = (load_file(x / "adapter_model.safetensors") for x in (asked.out, tmp_path / "small"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_second_process_does_not_train_into_the_same_folder(asked):
    def second(stage: str, _done: int, _total: int) -> None:
        if stage == "train":
            with pytest.raises(RunError, match="Another process is training into"):
                finetune(asked)

    assert finetune(replace(asked, steps=1), second).steps == 1
    assert not (asked.out / ".lock").exists()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_variables_of_torchrun_that_were_set_in_part_are_refused(name, asked, monkeypatch):
    monkeypatch.setenv(name, "1")
    with pytest.raises(MachineError, match=r"set in part|which of how many processes"):
        finetune(asked)
    assert not asked.out.exists()


def test_a_run_does_not_go_on_with_other_pixels_under_the_same_names(asked):
    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(asked, stop)
    (asked.data.parent / "3.png").write_bytes(tiny.picture(77))
    with pytest.raises(RunError, match=r"asked for otherwise \(images\)"):
        finetune(asked)


def test_an_adapter_on_other_weights_of_the_same_shapes_is_refused(asked, tmp_path):
    finetune(replace(asked, steps=1))
    other = Path(copytree(asked.model, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({n: 1.3 * t for n, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ManifestError, match="trained on other weights"):
        load_finetuned(asked.out, str(other), "cpu")


def test_what_other_packages_say_in_vain_is_not_on_stderr(asked, tmp_path, caplog):
    folder = Path(copytree(asked.model, tmp_path / "short"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 4}))
    finetune(replace(asked, model=str(folder), steps=1))  # peft's FutureWarning would be an error here
    assert not [x for x in caplog.messages if "indexing errors" in x]


def test_what_the_machine_lacks_is_one_sentence(asked, monkeypatch):
    with pytest.raises(MachineError, match=r"needs a CUDA device.*adamw_torch"):
        finetune(replace(asked, optimizer="adamw_8bit"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MachineError, match=r"pip install 'qprobe\[train\]'"):
        finetune(asked)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(x) for x in arguments], prog_name="qprobe")


def test_the_command_line_is_the_function(asked):
    line = (
        *("finetune", asked.manifest, "--data", asked.data, "--out", asked.out, "--model", asked.model),
        *("--device", "cpu", "--steps", 1, "--accumulation", 2, "--learning-rate", 2e-2, "--rank", 4),
        *("--max-length", 128, "--base", "nf4", "--json"),
    )
    result = run(*line)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["base"], found["steps"], found["held_out_lines"]) == ("nf4", 1, 1)
    assert [x["step"] for x in found["history"]] == [1]
    again = run(*line)
    assert again.exit_code == 1 and "finished adapter" in again.stderr and len(again.stderr.splitlines()) == 1


def test_two_ways_to_hold_out_are_wrong_usage():
    line = ("finetune", "f", "--data", "d", "--out", "o")
    assert run(*line, "--eval-data", "e", "--held-out", "0.2").exit_code == 2
    assert run(*line, "--steps", "3", "--epochs", "1").exit_code == 2
    assert run("finetune", "f", "--data", "d", "--out", "o", "--base", "int8").exit_code == 2
