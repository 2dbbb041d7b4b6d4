"""A model that its user loaded becomes the reference without being touched; what cannot is named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qprobe.errors import ModelError
from qprobe.loading.loaded import loaded_model, loaded_reference, loaded_skeleton
from qprobe.loading.processor import load_processor
from qprobe.loading.reference import load_reference
from qprobe.loading.source import resolve
from qprobe.measure.digests import weights_digest
from tests import tiny


def load(folder: Path, **options: Any) -> Any:
    architecture = tiny.RECIPES[folder.name].architecture
    return getattr(transformers, architecture).from_pretrained(folder, **options)


def any_processor(*_: Any) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_reference_of_a_loaded_model_is_that_of_its_folder(
    name: str, dtype: torch.dtype, tiny_folder: Any
):
    folder = tiny_folder(name)
    wanted = load_reference(str(folder), "cpu")
    loaded = loaded_model(load(folder, dtype=dtype).train(), any_processor)
    found = loaded_reference(loaded, loaded_skeleton(loaded, "bfloat16"))

    assert found.identity.fingerprint == wanted.identity.fingerprint
    assert found.skeleton.fingerprint == wanted.skeleton.fingerprint
    cpu = torch.device("cpu")
    assert weights_digest(found.model, cpu) == weights_digest(wanted.model, cpu)
    ours, theirs = (dict(x.model.named_buffers(remove_duplicate=False)) for x in (found, wanted))
    assert ours.keys() == theirs.keys()
    assert all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)
    ties = [
        sorted(len([n for n, p in _named(x.model) if p is q]) for q in x.model.parameters())
        for x in (found, wanted)
    ]
    assert ties[0] == ties[1]
    assert not any(m.training for m in found.model.modules())
    assert not any(p.requires_grad for p in found.model.parameters())


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def test_weights_are_shared_in_their_own_dtype_and_copied_in_another(tiny_folder: Any):
    model = load(tiny_folder("llama_tied"), dtype=torch.bfloat16)
    own = {name: p.data_ptr() for name, p in _named(model)}
    loaded = loaded_model(model, any_processor)
    for dtype, is_shared in (("bfloat16", True), ("float16", False)):
        reference = loaded_reference(loaded, loaded_skeleton(loaded, dtype))
        assert all((p.data_ptr() == own[name]) is is_shared for name, p in _named(reference.model))


def test_what_is_done_to_the_reference_is_not_done_to_the_model(tiny_folder: Any):
    model = load(tiny_folder("llama"), dtype=torch.bfloat16).train()
    reference = loaded_reference(
        loaded := loaded_model(model, any_processor), loaded_skeleton(loaded, "bfloat16")
    )
    for parameter in reference.model.parameters():
        parameter.data = parameter.data.float() + 1
    for buffer in reference.model.buffers():
        buffer.zero_()
    reference.model.config.use_cache = False
    reference.model.generation_config.max_length = 3
    reference.model.register_forward_hook(lambda *_: None)
    fresh = load(tiny_folder("llama"), dtype=torch.bfloat16)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(_named(model), _named(fresh), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.buffers(), fresh.buffers(), strict=True))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not model._forward_hooks
    assert model.config.to_dict() == fresh.config.to_dict()
    assert model.generation_config.to_dict() == fresh.generation_config.to_dict()


def test_it_has_its_hub_id_where_it_came_from_there_and_never_a_folders_name(tiny_folder: Any):
    model = load(tiny_folder("llama"))
    assert str(tiny_folder("llama")) in model.config._name_or_path
    source = loaded_model(model, any_processor).source
    assert (source.id, source.revision) == ("LlamaForCausalLM", None)
    model.config._name_or_path, model.config._commit_hash = "acme/tiny-llama", "1f" * 20
    source = loaded_model(model, any_processor).source
    assert (source.id, source.location, source.revision) == ("acme/tiny-llama", "acme/tiny-llama", "1f" * 20)


def test_a_relative_folder_that_reads_like_a_hub_id_is_none(
    tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "llama").symlink_to(tiny_folder("llama"))
    model = transformers.LlamaForCausalLM.from_pretrained("out/llama")
    assert model.config._name_or_path == "out/llama"
    assert loaded_model(model, any_processor).source.id == "LlamaForCausalLM"


def adapted(model: Any) -> Any:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def offloaded(model: Any) -> Any:
    from accelerate import cpu_offload

    model.hf_device_map = {"": "cpu"}
    return cpu_offload(model)


def in_4bit(model: Any) -> Any:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    return load(Path(model.config._name_or_path), quantization_config=config, device_map="cpu")


# peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (adapted, "whose layers have adapters"),
        (lambda _: nn.Linear(2, 2), "is a Linear, which cannot be scanned"),
        (lambda _: None, "is a NoneType"),
        (lambda model: model.to("meta"), "lies on the meta device"),
        (offloaded, "offloaded"),
        (in_4bit, "quantized already"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(change: Any, said: str, tiny_folder: Any):
    with pytest.raises(ModelError, match=said):
        loaded_model(change(load(tiny_folder("llama"))), any_processor)


@pytest.mark.parametrize(("processor", "said"), [(None, "Pass processor="), ("acme/x", "is a str")])
def test_a_processor_that_is_none_is_refused(processor: Any, said: str, tiny_folder: Any):
    with pytest.raises(ModelError, match=said):
        loaded_model(load(tiny_folder("llama")), processor)


def replaced(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = nn.Linear(8, 8)


def removed(model: Any) -> None:
    del model.model.layers[0].self_attn.q_proj.weight


def added(model: Any) -> None:
    model.model.layers[0].extra = nn.Linear(8, 8)


def untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", replaced, r"mlp.up_proj.weight has the shape \(8, 8\)"),
        ("llama", removed, "has no parameter model.layers.0.self_attn.q_proj.weight"),
        ("llama", added, "has a parameter model.layers.0.extra.weight"),
        ("llama_tied", untied, "are one weight by its config"),
    ],
)
def test_a_model_that_its_config_does_not_build_is_refused(
    name: str, change: Any, said: str, tiny_folder: Any
):
    model = load(tiny_folder(name))
    change(model)
    with pytest.raises(ModelError, match=said):
        loaded_skeleton(loaded_model(model, any_processor), "bfloat16")


def test_the_processor_is_a_copy(tiny_folder: Any):
    processor = load_processor(resolve(str(tiny_folder("llama"))))
    processor.pad_token = None
    before = copy.deepcopy(processor.special_tokens_map)
    loaded = loaded_model(load(tiny_folder("llama")), processor)
    reference = loaded_reference(loaded, loaded_skeleton(loaded, "bfloat16"))
    reference.processor.pad_token = reference.processor.eos_token
    assert processor.special_tokens_map == before
