"""The peers, as data: which worker runs with which options, and what it needs to be importable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Bits per weight that our lists fill: a step below and at each size that peers have.
BUDGETS = (4.25, 4.3125, 4.5, 5.0, 5.5, 6.0, 6.5)
GGML = ("IQ4_NL", "Q4_K_M", "Q5_0", "Q5_K_M")


@dataclass(frozen=True)
class Peer:
    """One process. tool: the import name that its Python must know."""

    name: str
    worker: str
    tool: str
    options: dict[str, Any] = field(default_factory=dict)


def _compressor(method: str, group: int) -> Peer:
    name = f"llm-compressor {method.upper()} g{group}"
    return Peer(name, "llm_compressor", "llmcompressor", {"name": name, "method": method, "group": group})


def _auto_round(name: str, iters: int, **more: Any) -> Peer:
    options = {"name": name, "iters": iters, "group": 64, "more": more}
    return Peer(name, "auto_round", "auto_round", options)


def _torchao(name: str, algorithm: str) -> Peer:
    return Peer(name, "ao", "torchao", {"name": name, "group": 64, "algorithm": algorithm})


def _ours(name: str, kind: str) -> Peer:
    return Peer(name, "ours", "qprobe", {"name": name, "kind": kind})


OURS = (_ours("nf4", "nf4"), _ours("nf4-calibrated", "calibrated"), _ours("nf4-calibrated, tuned", "tuned"))
FORMATS = (
    *OURS,
    Peer("quanto", "quanto", "optimum.quanto"),
    _torchao("torchao int4 g64", "affine"),
    _torchao("torchao int4 g64, HQQ scales", "hqq_scale_only"),
    Peer("llama.cpp", "ggml", "xllamacpp", {"formats": GGML}),
    _compressor("gptq", 64),
    _compressor("awq", 64),
    _auto_round("AutoRound g64, 0 steps", 0),
    _auto_round("AutoRound g64, light recipe", 50, lr=5e-3),
    _auto_round("AutoRound g64, 200 steps", 200),
    _auto_round("AutoRound g64, best recipe", 1000, enable_alg_ext=True),
)

SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)  # of the bytes that 4-bit saves, given back to layers in 16-bit


def _model_opt(method: str) -> Peer:
    name = f"ModelOpt auto_quantize, {method}"
    options = {"name": name, "method": method, "shares": SHARES}
    return Peer(name, "model_opt", "modelopt.torch.quantization", options)


CHOOSERS = (
    Peer("ours", "our_lists", "qprobe", {"shares": SHARES}),
    Peer("AutoRound AutoScheme", "auto_scheme", "auto_round", {"shares": SHARES}),
    _model_opt("gradient"),
    _model_opt("kl_div"),
)
