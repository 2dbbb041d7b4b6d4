"""What the commands said, computed a second time: from tensors, by bitsandbytes' own functions, in loops.

Nothing here asks qprobe what is in 4-bit, what an error is, or how much a model occupies. Its processor's
inputs are used, and the names under which it reports.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import qprobe
from tests.benchmarks.architecture_matrix.road import OK, Course

ERROR_TOLERANCE = 1e-4  # relative, of sums in float32 against float64


def untrue(course: Course) -> dict[str, list[str]]:
    """By oracle, what disagrees; an oracle that had nothing to look at is left out."""
    cells, given = course.cells, course.given
    ran = {name for name, (state, _) in cells.items() if state == OK}
    found: dict[str, list[str]] = {}
    scan = given.get("scan") or given.get("scan weights")
    if scan is None:
        return found
    plain = plain_model(course.folder)
    table = scan.folder.table.set_index("layer")
    found["weight"] = weight_errors(plain, table)
    if "scan weights" in ran and "scan" in ran:
        found["weight"] += weight_errors(plain, given["scan weights"].folder.table.set_index("layer"))
    if "load" in ran:
        manifest = qprobe.read_manifest(scan.skiplist)
        found["modules"] = modules(course, plain, manifest)
        found["bytes"] = stored(course, manifest)
    return found


def plain_model(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it, by the class that its config names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    for module in model.modules():
        if type(module).__name__.endswith(("Top1Router", "Top2Router")):
            module.classifier.to(torch.float32)  # as its first forward does
    return model


# What is in 4-bit ---------------------------------------------------------------------------------------


def in_four_bit(model: nn.Module) -> set[str]:
    """Names of modules, and of fused parameters, whose weights are 4-bit codes."""
    found = set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, bnb.nn.Params4bit) and weight.dtype == torch.uint8:
            found.add(name)
        for leaf, parts in getattr(module, "parametrizations", {}).items():
            if getattr(getattr(parts, "original", None), "dtype", None) == torch.uint8:
                found.add(f"{name}.{leaf}")
    return found


def modules(course: Course, plain: nn.Module, manifest: Any) -> list[str]:
    """Loaded, reloaded and listed must be one set, and every linear a row."""
    listed = {x.name for x in manifest.layers if x.precision == "nf4"}
    wrong = []
    for step in ("load", "reload"):
        if course.cells.get(step, ("",))[0] == OK:
            got = in_four_bit(course.given[step])
            wrong += [f"{step}: {x} is in 4-bit and not listed so" for x in sorted(got - listed)]
            wrong += [f"{step}: {x} is listed in 4-bit and is not" for x in sorted(listed - got)]
    everything = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    converted = in_four_bit(plain_model(course.folder, quantization_config=everything))
    known = {x.name for x in manifest.layers}
    wrong += [f"transformers puts {x} in 4-bit, which is no row" for x in sorted(converted - known)]
    linears = {name for name, x in plain.named_modules() if type(x) is nn.Linear}
    wrong += [f"{x} is a linear and no row" for x in sorted(linears - known)]
    return wrong


# What 4-bit does ----------------------------------------------------------------------------------------


def through_nf4(weight: Tensor) -> Tensor:
    """What bitsandbytes reads back of `weight`, in its dtype."""
    codes, state = bnb.functional.quantize_4bit(
        weight.detach().contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return bnb.functional.dequantize_4bit(codes, state).to(weight.dtype).reshape(weight.shape)


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a linear, or the fused one that `name` itself names."""
    parent, _, leaf = name.rpartition(".")
    held = getattr(model.get_submodule(parent), leaf)
    return held if isinstance(held, nn.Parameter) else held.weight


def weight_errors(model: nn.Module, table: Any) -> list[str]:
    """weight_nmse of every row that has one."""
    wrong = []
    for name, said in table["weight_nmse"].dropna().items():
        weight = weight_of(model, name).detach().to(torch.bfloat16)  # as the files hold it
        error = (through_nf4(weight).double() - weight.double()).square().sum()
        wrong += unlike(f"weight_nmse of {name}", said, float(error / weight.double().square().sum()))
    return wrong


def unlike(
    what: str, said: float, computed: float, relative: float = ERROR_TOLERANCE, floor: float = 0
) -> list[str]:
    """A sentence if the two are not the same number."""
    if math.isclose(said, computed, rel_tol=relative, abs_tol=floor):
        return []
    return [f"{what} is {computed:.6g}, not {said:.6g}"]


# What it occupies ---------------------------------------------------------------------------------------


def occupied(model: nn.Module) -> int:
    """Bytes of parameters, saved buffers and block scales, each storage once."""
    tensors: list[Tensor] = list(model.parameters())
    for module in model.modules():
        kept = set(module._buffers) - module._non_persistent_buffers_set
        tensors += [module._buffers[x] for x in kept if module._buffers[x] is not None]
        states = [getattr(module._parameters.get("weight"), "quant_state", None)]
        for parts in getattr(module, "parametrizations", {}).values():
            states += [getattr(part, "quant_state", None) for part in parts]
        for state in states:
            if state is not None:
                tensors += [state.absmax, state.state2.absmax]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def stored(course: Course, manifest: Any) -> list[str]:
    """Bytes of the loaded models against those of manifest, plan and audit."""
    wrong = []
    for step in ("load", "reload"):
        if course.cells.get(step, ("",))[0] == OK:
            got = occupied(course.given[step])
            if got != manifest.budget.total_bytes:
                wrong.append(f"{step}: {got:,} bytes, not {manifest.budget.total_bytes:,} as listed")
    if course.cells["plan"][0] == OK:
        sizes = {x.name: x for x in course.given["plan"].layouts}
        if sizes["nf4"].total_bytes != manifest.budget.standard_4bit_bytes:
            wrong.append("plan and manifest disagree about standard 4-bit")
        got = occupied(plain_model(course.folder))
        if got != sizes["16-bit"].total_bytes:
            wrong.append(f"16-bit: {got:,} bytes, not {sizes['16-bit'].total_bytes:,} as planned")
    return wrong
