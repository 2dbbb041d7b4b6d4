"""Whether an engine that people serve with reads what `qprobe quantize` or `qprobe merge` wrote.

    python -m tests.benchmarks.serving DIR --engine vllm [--prompt TEXT ...] [--tokens 32]
    python -m tests.benchmarks.serving DIR --engine vllm-loader

DIR: a checkpoint in 4-bit, whose config.json has the list of `qprobe export skiplist.json --to vllm`.

- `vllm` needs a GPU, vLLM, and from its version 0.33 on vllm-bnb-plugin: generates greedily with it and with
  plain transformers, and says how many of the tokens are the same.
- `vllm-loader` needs neither: `pip install --no-deps vllm-bnb-plugin`, whose loader and rule are plain
  Python. What they import of vLLM is replaced by names that do nothing. For each linear: whether the rule
  takes it for 4-bit where the manifest does, whether the loader finds its quantization state, and whether
  that reads back to the weight of plain transformers, bit by bit. Whether vLLM's own model takes the names is
  not seen.

Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from qprobe.exports.targets.vllm import vllm_modules
from qprobe.loading.config import model_class
from qprobe.manifest.read import read_manifest

PLUGIN = "vllm_bnb_plugin"
PROMPTS = ("The capital of France is", "To sort a list in Python, one", "A train enters the station and")


def plain(folder: Path, device: str) -> Any:
    """The checkpoint as plain transformers loads it."""
    return model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, device_map=device)


# The whole engine -----------------------------------------------------------------------------------------


def generated(folder: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    """What differs between the greedy answers of vLLM and those of transformers."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(x)["input_ids"] for x in prompts]
    model = plain(folder, "cuda")
    wanted = []
    for one in ids:
        asked = torch.tensor([one], device="cuda")
        made = model.generate(input_ids=asked, max_new_tokens=tokens, do_sample=False)
        wanted.append(made[0, len(one) :].tolist())
    del model
    torch.cuda.empty_cache()
    engine = LLM(str(folder), quantization="bitsandbytes", gpu_memory_utilization=0.5, max_model_len=2048)
    how = SamplingParams(temperature=0.0, max_tokens=tokens)
    answers = engine.generate([{"prompt_token_ids": one} for one in ids], how)
    found = [list(x.outputs[0].token_ids) for x in answers]
    same = sum(a == b for x, y in zip(wanted, found, strict=True) for a, b in zip(x, y, strict=False))
    print(f"{same} of {sum(map(len, wanted))} greedy tokens are the same.")
    for one in found:
        print(repr(tokenizer.decode(one)))
    # Kernels differ: a tie may fall otherwise, and the rest of an answer with it. Noise does not agree.
    return [] if 2 * same > sum(map(len, wanted)) else ["Less than half of the tokens are the same."]


# Its loader alone -----------------------------------------------------------------------------------------


class _Names(ModuleType):
    """A module in which any name is a class that takes anything and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda *_, **__: None, "__getattr__": lambda *_: print})
        setattr(self, name, made)
        return made


class _Finder:
    """Finds every module of vLLM, with nothing in it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "vllm" else None  # pyright: ignore

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


@contextmanager
def plugin() -> Iterator[tuple[Any, Any]]:
    """(the module with the loader, the one with the rule) of vllm-bnb-plugin, without vLLM."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)  # pyright: ignore[reportArgumentType]
    try:
        platforms = importlib.import_module("vllm.platforms")
        platforms.current_platform = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
            device_type="cpu", is_rocm=lambda: False, is_cuda_alike=lambda: False
        )
        files: Any = importlib.import_module("vllm.model_executor.model_loader.weight_utils")
        files.safetensors_weights_iterator = tensors
        spec = importlib.util.find_spec(PLUGIN)
        assert spec is not None and spec.submodule_search_locations, f"pip install --no-deps {PLUGIN}"
        for name in (PLUGIN, f"{PLUGIN}.quantization"):  # without what they do when they are imported
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [str(Path(spec.submodule_search_locations[0], *name.split(".")[1:]))]
        yield (
            importlib.import_module(f"{PLUGIN}.bitsandbytes_loader"),
            importlib.import_module(f"{PLUGIN}.quantization.utils"),
        )
    finally:
        sys.meta_path.remove(finder)  # pyright: ignore[reportArgumentType]
        for name in [x for x in sys.modules if x.partition(".")[0] in ("vllm", PLUGIN)]:
            del sys.modules[name]


def tensors(files: Sequence[str], *_: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What lies in `files`, as vLLM's iterator gives it."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def differences(folder: Path) -> list[str]:
    """What the rule and the loader of vllm-bnb-plugin make of the checkpoint otherwise than it is meant."""
    manifest = read_manifest(folder / "skiplist.json")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    kept = vllm_modules(manifest)
    model = plain(folder, "cpu")
    linears = {name: x for name, x in model.named_modules() if isinstance(x, Linear4bit)}
    with plugin() as (loading, rules):
        listed = config.get("llm_int8_skip_modules") or []
        wrong = [
            f"The rule {'keeps' if not stays else 'does not keep'} {name} in 16-bit."
            for name, stays in kept.items()
            if rules.is_layer_skipped_bnb(name, listed) != stays
        ]
        loader = loading.BitsAndBytesModelLoader(None)
        loader.load_config = SimpleNamespace(use_tqdm_on_load=False)
        states: dict[str, Any] = {}
        files = sorted(str(x) for x in folder.glob("*.safetensors"))
        codes = dict(loader._quantized_4bit_generator(files, True, states))
        loader._dequantize_dq(states)
    read = {
        name: dequantize_4bit(codes[name], state) for name, state in states.items()
    }  # under the names of the files, which for some models are not those of the loaded one
    wanted = {name: dequantize_4bit(x.weight.data, x.weight.quant_state) for name, x in linears.items()}
    left = {name.removesuffix(".weight"): x for name, x in read.items()}
    for name, weight in wanted.items():
        same = next((k for k, x in left.items() if x.shape == weight.shape and torch.equal(x, weight)), None)
        if same is None:
            wrong.append(f"No weight that the loader reads is that of {name}.")
        else:
            del left[same]
    wrong += [f"The loader reads {name} in 4-bit, which is in 16-bit." for name in left]
    print(f"{len(wanted)} layers in 4-bit, {len(kept)} modules of vLLM: {len(wrong)} differences.")
    return wrong


def main() -> None:
    """Say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=("vllm", "vllm-loader"), required=True)
    parser.add_argument("--prompt", nargs="+", default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=32)
    asked = parser.parse_args()
    found = (
        differences(asked.folder)
        if asked.engine == "vllm-loader"
        else generated(asked.folder, asked.prompt, asked.tokens)
    )
    for sentence in found:
        print(sentence)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
