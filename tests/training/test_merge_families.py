"""Ten families, each merged in both forms: the tensors and logits are those of a merge written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from qprobe.checkpoint.adapters.effect import Arrived
from qprobe.checkpoint.adapters.lora import read_adapter
from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.checkpoint.starts.attached import save_adapter
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import skeleton_of
from qprobe.loading.source import resolve
from qprobe.system.devices import AskedDevice
from qprobe.training.merging.forms import WRITERS, Job
from qprobe.training.origin import origin_of
from tests import tiny
from tests.checkpoint.manifests import inventory_of
from tests.reading import encode
from tests.training.adapters import DECODERS, SCALING, added, plainly

pytestmark = [
    pytest.mark.slow,
    # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

FAMILIES = (*tiny.VISION_NAMES, "llama", *DECODERS)
EYES = {"vision", "projector"}


def inputs_of(name: str, folder: Path) -> Mapping[str, Tensor]:
    """A question, its answer, and an image where the family sees, as the processor in `folder` reads them."""
    samples = tiny.questions(name, answer="a blue cat")
    return encode(load_processor(resolve(str(folder))), samples, torch.bfloat16).inputs


@torch.inference_mode()
def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def called(model: Any, inputs: Mapping[str, Tensor]) -> set[str]:
    """The modules that a forward of `inputs` runs."""
    found: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, n=n: found.add(n)) for n, m in model.named_modules()]
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return found


def add(module: Any, more: Tensor) -> None:
    """`more` added to the weight of `module` in float32, and back in the form that it had."""
    if not isinstance(module, Linear4bit):
        module.weight.data = (module.weight.data.float() + more).to(module.weight.dtype)
        return
    sums = dequantize_4bit(module.weight.data, module.weight.quant_state).float() + more
    module.weight.data, module.weight.quant_state = quantize_4bit(
        sums.to(torch.bfloat16), blocksize=64, compress_statistics=True, quant_type="nf4"
    )


def stored(module: Any) -> dict[str, Tensor]:
    """The weight of `module` as files hold it: of a 4-bit layer the codes and all of its scales."""
    parts = module.weight.quant_state.as_dict(packed=True) if isinstance(module, Linear4bit) else {}
    return {"weight": module.weight.data, **parts}


def assert_same(found: Any, wanted: Any, layers: Iterable[str]) -> None:
    for layer in layers:
        mine, theirs = (stored(x.get_submodule(layer)) for x in (found, wanted))
        assert mine.keys() == theirs.keys(), layer
        assert all(torch.equal(mine[part], theirs[part]) for part in theirs), layer


def test_ten_families_are_merged():
    assert len(set(FAMILIES)) == 10


@pytest.mark.parametrize("name", FAMILIES)
def test_both_forms_load_plainly_and_hold_what_a_merge_by_hand_does(name, family, tmp_path):
    root = family(name)
    adapter = read_adapter(root / "adapter")
    origin = origin_of(adapter, root / "skiplist.json", "dynamic", str(root / "model"), None)
    skeleton = skeleton_of(resolve(origin.model), "bfloat16")
    job = Job(adapter, origin, skeleton, tmp_path / "out", AskedDevice("cpu"))
    for form, write in WRITERS.items():
        (tmp_path / form).mkdir()
        assert 0.9 < sum(write(job, tmp_path / form).arrived.values(), Arrived()).share < 1.1

    delta, inputs = added(root / "adapter", SCALING), inputs_of(name, root / "model")
    sixteen, (four, _) = plainly(root / "model"), load_dynamic_4bit(origin.manifest, origin.model, "cpu")
    towers = {x.name: x.tower for x in inventory_of(root / "model").layers if x.name in delta}
    assert delta.keys() == towers.keys() <= called(sixteen, inputs)
    assert EYES.issubset(towers.values()) == (name in tiny.VISION_NAMES)
    for form, base in (("16-bit", sixteen), ("4-bit", four)):
        before = logits(base, inputs)
        for layer in (x for x in delta if towers[x] in EYES):
            add(base.get_submodule(layer), delta[layer])
        assert torch.equal(logits(base, inputs), before) == (name not in tiny.VISION_NAMES)
        for layer in (x for x in delta if towers[x] not in EYES):
            add(base.get_submodule(layer), delta[layer])
        made, read = plainly(tmp_path / form), inputs_of(name, tmp_path / form)
        assert_same(made, base, delta)
        assert torch.equal(logits(made, inputs), logits(base, inputs))
        assert read.keys() == inputs.keys() and all(torch.equal(read[x], inputs[x]) for x in inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_on_a_4bit_base_loads_with_peft_alone_on_the_plain_model(name, family, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict

    root, out = family(name), tmp_path / "adapter"
    tuned, _ = load_dynamic_4bit(
        root / "skiplist.json", str(root / "model"), "cpu", start="zero", rank=4, adapt="all"
    )
    torch.manual_seed(0)
    for parameter in (p for n, p in tuned.named_parameters() if "lora_B" in n):
        parameter.data = 0.05 * torch.randn(parameter.shape)
    save_adapter(tuned, out, str(root / "model"))
    base, inputs = plainly(root / "model"), inputs_of(name, root / "model")
    before = logits(base, inputs)
    again: Any = PeftModel.from_pretrained(base, str(out))
    wanted, found = (get_peft_model_state_dict(x, save_embedding_layers=False) for x in (tuned, again))
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert set(
        read_adapter(out).fits(skeleton_of(resolve(str(root / "model")), "bfloat16").model).values()
    ) == {"fits"}
    assert not torch.equal(logits(again, inputs), before)
    assert again.peft_config["default"].base_model_name_or_path == str(root / "model")
