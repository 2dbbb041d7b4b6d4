"""Which linears adapters go on: by part of the model or by name, and those that have to do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qprobe.errors import QprobeError
from qprobe.manifest.records import Manifest
from qprobe.models.family import PROJECTOR, VISION
from qprobe.models.towers import tower_of
from qprobe.options import DEFAULT_ADAPT
from qprobe.system.wording import named

Part = Literal["language", "projector", "vision"]
PARTS: tuple[Part, ...] = ("language", "projector", "vision")
ALL = "all"

# peft 0.21, tuners/tuners_utils.py, `_check_lora_target_modules_mamba`: kernels that read these weights
# directly, so that an adapter beside them would be passed over.
_MAMBA = ("Mamba", "Mamba2", "FalconMamba", "FalconH1", "NemotronH")
_MAMBA_FORBIDS = ("out_proj", "conv1d")
# vLLM 0.19, config/lora.py: `enable_tower_connector_lora` is off, and experimental for a few models.
_NOT_SERVED: dict[str, tuple[Part, ...]] = {"vllm": ("projector", "vision")}
# peft reaches them through `target_parameters` alone, see `refuse_experts`.
FUSED = "fused weights of experts take none"


@dataclass(frozen=True)
class LeftOut:
    """A linear that was asked for and has to do without an adapter; why: a clause."""

    layer: str
    why: str


@dataclass(frozen=True)
class Adapted:
    """The linears that adapters go on, in the order they were given, and those that were left out."""

    names: tuple[str, ...]
    left_out: tuple[LeftOut, ...]

    def notes(self) -> tuple[str, ...]:
        """One sentence for each reason that linears were left out for."""
        whys = dict.fromkeys(x.why for x in self.left_out)
        of = {why: [x.layer for x in self.left_out if x.why == why] for why in whys}
        return tuple(
            f"No adapter on {named(names)} ({len(names)} in all): {why}." for why, names in of.items()
        )


def adapted(
    names: Sequence[str],
    fixed: frozenset[str],
    architecture: str,
    adapt: str = DEFAULT_ADAPT,
    for_tool: str | None = None,
    experts: Sequence[str] = (),
) -> Adapted:
    """The linears of `names` (all of the model) that adapters go on.

    fixed: the output head and weights tied to an embedding, which never have one.
    adapt: parts of the model, `all`, or names of modules, with commas between them; a module stands for all
    linears in it. for_tool: a tool that serves the adapter, see `qprobe.options.FOR`. experts: names of fused
    weights of experts, which are left out where `adapt` means them too.
    Raises QprobeError where a word names nothing, or nothing is left.
    """
    words = [x.strip() for x in adapt.split(",") if x.strip()]
    part = _parts(names, architecture)
    wanted = {name for word in words for name in _named_by(word, part)}
    for word in words:
        if word not in (*PARTS, ALL) and not set(_named_by(word, part)):
            some = named([x for x in names if x not in fixed])
            raise QprobeError(
                f"--adapt {word!r} names no linear layer of {architecture}. Pass {', '.join(PARTS)} or "
                f"{ALL}, or names of its modules, such as {some}."
            )
    reasons = {x: _why_not(x, part[x], architecture, for_tool) for x in names if x in wanted - fixed}
    kept = tuple(x for x, why in reasons.items() if why is None)
    if not kept:
        there = [x for x in PARTS if any(part[n] == x for n in names if n not in fixed)]
        raise QprobeError(
            f"--adapt {adapt} leaves no linear layer of {architecture} for adapters. "
            f"It has linear layers in: {', '.join(there) or 'none'}."
        )
    part_of_experts = _parts(experts, architecture)
    fused = {x for word in words for x in _named_by(word, part_of_experts)}
    reasons |= {x: FUSED for x in experts if x in fused}
    return Adapted(kept, tuple(LeftOut(x, why) for x, why in reasons.items() if why is not None))


def refuse_experts(adapt: str, experts: Sequence[str]) -> None:
    """Raises QprobeError where `adapt` names one of the fused weights `experts`, or their module."""
    for word in (x.strip() for x in adapt.split(",")):
        found = [x for x in experts if word in (x, x.rpartition(".")[0])]
        if found:
            raise QprobeError(
                f"--adapt {word!r} names fused weights of experts ({named(found)}), which take no adapter: "
                "peft reaches them through target_parameters alone, with which the second forward on 4-bit "
                f"experts fails (0.21.2). Pass {', '.join(PARTS)} or {ALL}, which adapt attention and shared "
                "linear layers."
            )


def _parts(names: Sequence[str], architecture: str) -> dict[str, Part]:
    """The part of each linear; what is neither vision tower nor projector counts as language."""
    towers = {x: tower_of(x, architecture, True) for x in names}
    parts: dict[str, Part] = {VISION: "vision", PROJECTOR: "projector"}
    return {name: parts.get(tower, "language") for name, tower in towers.items()}


def _named_by(word: str, part: dict[str, Part]) -> list[str]:
    if word in (*PARTS, ALL):
        return [name for name, its in part.items() if word in (its, ALL)]
    return [name for name in part if name == word or name.startswith(f"{word}.")]


def _why_not(name: str, part: Part, architecture: str, for_tool: str | None) -> str | None:
    """Why the linear `name` has to do without an adapter; None if it has not."""
    is_mamba = any(architecture.startswith((f"{x}For", f"{x}Model")) for x in _MAMBA)
    if is_mamba and name.rpartition(".")[2] in _MAMBA_FORBIDS:
        return "peft puts none there, because Mamba's kernels read these weights past it"
    if part in _NOT_SERVED.get(for_tool or "", ()):
        return f"{for_tool} serves adapters of the language model only"
    return None


def adapted_layers(manifest: Manifest, adapt: str = DEFAULT_ADAPT, for_tool: str | None = None) -> Adapted:
    """`adapted` of the layers of `manifest`; stacked experts are none, see `refuse_experts`."""
    experts = [x.name for x in manifest.layers if x.is_experts]
    refuse_experts(adapt, experts)
    linears = [x for x in manifest.layers if not x.is_experts]
    fixed = frozenset(x.name for x in linears if _is_head(x.name, x.reason))
    return adapted([x.name for x in linears], fixed, manifest.model.architecture, adapt, for_tool, experts)


def _is_head(name: str, reason: str) -> bool:
    """The reasons are those that `select` writes for layers that are never quantized."""
    return name.rpartition(".")[2] in ("lm_head", "embed_out") or reason.startswith(("lm_head", "tied"))
