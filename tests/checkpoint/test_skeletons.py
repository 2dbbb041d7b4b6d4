"""A command builds a model without weights once at most, and hands it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from qprobe import audit, compare, finetune, import_list, load_dynamic_4bit, quantize, scan
from qprobe.checkpoint.load import load_standard_4bit
from qprobe.loading.skeleton import skeleton_of
from qprobe.loading.source import resolve
from qprobe.manifest.write import write_manifest
from qprobe.training.memory import Step, training_plan
from tests.checkpoint.manifests import every_third, manifest_for
from tests.training.test_finetune import write_data


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by each model that is built from a config alone."""
    found: list[Any] = []

    def watch(kind: Any) -> None:
        build = kind.from_config

        def counted(config: Any, **more: Any) -> Any:
            found.append(config)
            return build(config, **more)

        monkeypatch.setattr(kind, "from_config", counted)

    for kind in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        watch(kind)
    return found


COMMANDS: dict[str, Callable[[str, Path, Path], Any]] = {
    "load_dynamic_4bit": lambda model, manifest, out: load_dynamic_4bit(manifest, model, "cpu"),
    "load_standard_4bit": lambda model, manifest, out: load_standard_4bit(model, device="cpu"),
    "quantize": lambda model, manifest, out: quantize(manifest, out / "4bit", model, "cpu"),
    "audit --load": lambda model, manifest, out: audit(model, load=True, device="cpu"),
    "plan --training": lambda model, manifest, out: training_plan(model, Step(), manifest),
    "import": lambda model, manifest, out: import_list(out / "list.json", model),
    "compare": lambda model, manifest, out: compare(
        manifest, model=model, samples=2, device="cpu", max_new_tokens=2
    ),
    "scan": lambda model, manifest, out: scan(
        model, samples=4, device="cpu", max_new_tokens=2, out=out / "run", measures=("activation",)
    ),
    "scan --measures weight": lambda model, manifest, out: scan(
        model, device="cpu", out=out / "run", measures=("weight",)
    ),
    "finetune --base nf4": lambda model, manifest, out: finetune(
        manifest,
        data=out / "train.jsonl",
        out=out / "adapter",
        model=model,
        base="nf4",
        device="cpu",
        steps=1,
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_builds_one_skeleton(
    tiny_folder: Callable[[str], Path], tmp_path: Path, built: list[Any], command: str
) -> None:
    folder = tiny_folder("mllama")
    manifest = tmp_path / "skiplist.json"
    write_manifest(manifest, manifest_for(folder, every_third(folder)))
    (tmp_path / "list.json").write_text('["lm_head"]')
    write_data(tmp_path / "train.jsonl", 4)
    built.clear()
    COMMANDS[command](str(folder), manifest, tmp_path)
    assert len(built) == 1


def test_a_copy_shares_the_modules_and_another_config_does_not(
    tiny_folder: Callable[[str], Path], built: list[Any]
) -> None:
    skeleton = skeleton_of(resolve(str(tiny_folder("llama"))), "bfloat16")
    same = skeleton.of_copy(resolve(str(tiny_folder("llama"))))
    assert same.model is skeleton.model and len(built) == 1
    other = skeleton.of_copy(resolve(str(tiny_folder("llama_tied"))))
    assert other.fingerprint != skeleton.fingerprint and len(built) == 2
