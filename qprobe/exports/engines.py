"""Lists for tools that serve or quantize: vLLM, llm-compressor, GPTQModel, AutoRound, llama.cpp."""

from __future__ import annotations

import json
import re
import shlex

from qprobe.errors import ManifestError
from qprobe.exports import matchers
from qprobe.exports.keys import (
    Reader,
    check_entries,
    exact,
    exact_entries,
    layer_spellings,
    reader,
    transformers_readers,
)
from qprobe.exports.shared import Written, bits_and_bytes
from qprobe.manifest.records import LayerChoice, Manifest
from qprobe.models.families import engine_of
from qprobe.models.family import OTHER, PROJECTOR, VISION
from qprobe.models.spellings import renamed
from qprobe.models.towers import tower_of
from qprobe.system.wording import counted

OTHER_CODES = (
    "NF4 is bitsandbytes' own; here the 4-bit layers get {codes} instead, so measure again what it costs."
)
EXPERTS = (
    "{count} stacked expert weights, such as {name}, are no linears, so they stay in 16-bit and the list "
    "cannot name them. {tool}"
)
TEXT_ONLY = "{tool} quantizes the decoder's layers only, unless told otherwise; the other names do no harm."


def _experts(manifest: Manifest, tool: str) -> tuple[str, ...]:
    """A note on stacked experts with what `tool`, a sentence, does to them; nothing without such."""
    names = [x.name for x in manifest.uncovered if ".experts." in x.name]
    return (EXPERTS.format(count=len(names), name=names[0], tool=tool),) if names else ()


def vllm(manifest: Manifest) -> Written:
    """`quantization_config` for the config.json of a bitsandbytes checkpoint that both load the same way."""
    fused = Reader("vLLM", matchers.vllm, vllm_modules(manifest))
    readers = transformers_readers(manifest)
    ours = exact_entries(readers, str, exact)
    theirs = [name for name, kept in fused.keep.items() if kept]
    entries = list(dict.fromkeys([*ours, *theirs]))
    check_entries(entries, [*readers, fused])
    config = {"quant_method": "bitsandbytes", **bits_and_bytes(manifest, entries)}
    architecture, dropped = (
        manifest.model.architecture,
        engine_of("vllm", manifest.model.architecture).dropped,
    )
    lacks = [f"vLLM serves no {architecture} since {dropped}."] if dropped else []
    return Written(
        json.dumps({"quantization_config": config}, indent=2) + "\n",
        (
            "Put it into the config.json of the checkpoint; vLLM takes a skip-list from nowhere else, and "
            "its own --quantization bitsandbytes of a 16-bit checkpoint keeps nothing.",
            "Names of transformers and of vLLM stand in one list; each ignores the other's.",
            "The rule is that of vLLM up to 0.19.1 at least; 0.33.0 no longer ships bitsandbytes itself.",
            *lacks,
            *_experts(
                manifest,
                "vLLM chooses the precision of experts by itself: check that it loads the checkpoint's.",
            ),
        ),
    )


def vllm_modules(manifest: Manifest) -> dict[str, bool]:
    """By vLLM's name of each (fused) linear: whether it stays in 16-bit.

    Raises ManifestError for a fused group of which only a part stays.
    """
    engine = engine_of("vllm", manifest.model.architecture)
    keep: dict[str, tuple[str, bool]] = {}
    names = {names.legacy: (name, kept) for name, (names, kept) in layer_spellings(manifest).items()}
    for legacy, (name, kept) in names.items():
        parent, _, leaf = legacy.rpartition(".")
        for joint, members in engine.fused.items():
            if leaf in members and all(f"{parent}.{x}" in names for x in members):
                legacy = f"{parent}.{joint}"
        joined = renamed(legacy, engine.renames)
        other, other_kept = keep.setdefault(joined, (name, kept))
        if other_kept != kept:
            raise ManifestError(_split(joined, other, other_kept, name))
    return {name: kept for name, (_, kept) in keep.items()}


def _split(joint: str, other: str, other_kept: bool, name: str) -> str:
    in_16bit, in_4bit = (other, name) if other_kept else (name, other)
    return (
        f"vLLM makes one matrix {joint} of layers with different precisions: {in_16bit} stays in 16-bit, "
        f"{in_4bit} does not. Choose a list that keeps such groups whole, with `qprobe select RUN --for "
        "vllm` or `qprobe scan --for vllm`, and build the checkpoint from it."
    )


def llm_compressor(manifest: Manifest) -> Written:
    """Keywords of llm-compressor 0.14.0's QuantizationModifier or GPTQModifier."""
    readers = _module_readers(manifest, matchers.compressed_tensors, "llm-compressor")
    entries = exact_entries(readers, str, lambda name: f"re:{exact(name)}")
    data = {"targets": ["Linear"], "scheme": "W4A16", "ignore": entries}
    experts = _experts(
        manifest,
        "llm-compressor may unstack them into linears and quantize those: add 're:.*experts.*' to ignore.",
    )
    notes = (OTHER_CODES.format(codes="W4A16 integers"), *experts)
    return Written(json.dumps(data, indent=2) + "\n", notes)


def gptqmodel(manifest: Manifest) -> Written:
    """Keywords of GPTQModel 7.7.0's QuantizeConfig."""
    readers = _module_readers(manifest, matchers.gptqmodel, "GPTQModel")
    entries = exact_entries(readers, lambda name: f"-:{exact(name)}")
    data = {"bits": 4, "dynamic": {entry: {} for entry in entries}}
    notes = (OTHER_CODES.format(codes="GPTQ integers"), TEXT_ONLY.format(tool="GPTQModel"))
    return Written(json.dumps(data, indent=2) + "\n", notes)


def autoround(manifest: Manifest) -> Written:
    """Keywords of AutoRound 0.16.1: what its own `ignore_layers` writes into `layer_config`."""
    readers = _module_readers(manifest, matchers.auto_round, "AutoRound")
    entries = exact_entries(readers, lambda name: f"^{name}$")  # AutoRound escapes the dots itself
    as_16bit = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}
    data = {"scheme": "W4A16", "layer_config": dict.fromkeys(entries, as_16bit)}
    notes = (OTHER_CODES.format(codes="W4A16 integers"), TEXT_ONLY.format(tool="AutoRound"))
    return Written(json.dumps(data, indent=2) + "\n", notes)


def _module_readers(manifest: Manifest, rule: matchers.Rule, tool: str) -> list[Reader]:
    """Tools that call modules as the transformers they run on does, today's or 5.0."""
    return [
        reader(manifest, f"{tool} on today's transformers", rule, lambda x: x.name),
        reader(manifest, f"{tool} on transformers 5.0", rule, lambda x: x.wrapped),
    ]


# gguf 0.19.0, tensor_mapping.py and constants.py, for the decoders of the Llama family.
GGUF_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# The same for stacked experts: one parameter here may be two tensors there.
GGUF_EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
_GGUF_EXPERT = re.compile(rf"layers\.(\d+)\.\w+\.experts\.({'|'.join(GGUF_EXPERTS)})(?:\.weight)?$")
# llama.cpp, src/llama-quant.cpp (2026): it leaves biases and routers ("ffn_gate_inp") as they are.
_GGUF_NEVER = re.compile(r"bias$|\.(?:gate|router)\.weight$")
_GGUF_LAYER = re.compile(rf"layers\.(\d+)\.({'|'.join(map(re.escape, GGUF_LAYERS))})$")


def llama_cpp(manifest: Manifest) -> Written:
    """The command line of llama-quantize.

    Raises ManifestError for a decoder layer, or another weight in 16-bit, that llama.cpp has no tensor for.
    """
    half = {"bfloat16": "bf16", "float16": "f16"}[manifest.format.compute_dtype]
    tensors = gguf_tensors(manifest)
    entries = [f"^{re.escape(name)}$={half}" for name, kept in tensors.items() if kept]
    check_entries(entries, [Reader("llama.cpp", matchers.llama_cpp, tensors)])
    # The embedding is no linear and so in 16-bit here; a tied head is the embedding in a GGUF file.
    options = [f"--token-embedding-type {half}"]
    options += [f"--output-tensor-type {half}"] if _keeps_own_head(manifest) else []
    options += [f"--tensor-type {shlex.quote(entry)}" for entry in entries]
    lines = ["llama-quantize", *options, "model-16bit.gguf model-iq4_nl.gguf IQ4_NL"]
    notes = [
        OTHER_CODES.format(codes="IQ4_NL"),
        "Do not add --pure, which turns --tensor-type off.",
        "llama-quantize may itself give a larger type to some tensors that no option names: read its log.",
    ]
    outside = _vision_part(manifest) & {x.name for x in manifest.layers}
    if outside:
        notes.append(
            f"What lies in the vision part ({counted(len(outside), 'layer')}) is in the mmproj file, which "
            f"llama-quantize does not touch: convert it with convert_hf_to_gguf.py --mmproj, and they all "
            f"stay in 16-bit."
        )
    return Written(" \\\n  ".join(lines) + "\n", tuple(notes))


def gguf_tensors(manifest: Manifest) -> dict[str, bool]:
    """By GGUF name of each decoder tensor: whether it stays in 16-bit, experts always.

    Output head and embedding, which have options of their own, are not among them.
    """
    found: dict[str, bool] = {}
    outside = _vision_part(manifest)
    for layer in manifest.layers:
        if layer.name in outside or _is_output(layer):
            continue
        match = _GGUF_LAYER.search(layer.name)
        if match is None:
            raise ManifestError(
                f"llama.cpp has no tensor for {layer.name} of {manifest.model.architecture}, so its models "
                f"cannot be told about that layer; export to another tool."
            )
        found[f"blk.{match[1]}.{GGUF_LAYERS[match[2]]}.weight"] = layer.precision == "bf16"
    for weight in manifest.uncovered:
        if weight.name in outside or _GGUF_NEVER.search(weight.name):
            continue
        match = _GGUF_EXPERT.search(weight.name)
        if match is None:
            raise ManifestError(
                f"{weight.name} of {manifest.model.architecture} stays in 16-bit, but llama-quantize cannot "
                f"be told so, since its tensor is not known here; export to another tool."
            )
        found |= dict.fromkeys((f"blk.{match[1]}.{x}.weight" for x in GGUF_EXPERTS[match[2]]), True)
    return found


def _keeps_own_head(manifest: Manifest) -> bool:
    """True if the model has an output head in 16-bit that is not its embedding."""
    heads = [x for x in manifest.layers if _is_output(x) and x.precision == "bf16"]
    return any(not x.reason.startswith("tied") for x in heads)


def _is_output(layer: LayerChoice) -> bool:
    return layer.name.rpartition(".")[2] == "lm_head"


def _vision_part(manifest: Manifest) -> frozenset[str]:
    """Names of layers and other weights outside the decoder and its head; a model without vision has none."""
    architecture = manifest.model.architecture
    if VISION not in {tower_of(x.name, architecture, True) for x in manifest.layers}:
        return frozenset()
    towers = {x.name: tower_of(x.name, architecture, True) for x in (*manifest.layers, *manifest.uncovered)}
    return frozenset(name for name, tower in towers.items() if tower in (VISION, PROJECTOR, OTHER))
