"""llama.cpp: the command line of llama-quantize, which gives single tensors a type by --tensor-type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from qprobe.errors import ManifestError
from qprobe.exports.keys import Reader, kept_names
from qprobe.exports.matchers import finds
from qprobe.exports.target import Target, Written
from qprobe.exports.writing import other_codes
from qprobe.manifest.records import Manifest, ManifestLayer
from qprobe.models.family import OTHER, PROJECTOR, VISION
from qprobe.models.towers import tower_of
from qprobe.system.wording import counted

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


def rule(entry: str, name: str) -> bool:
    """llama.cpp, tools/quantize/quantize.cpp (`parse_tensor_type`) and src/llama-quant.cpp (2026).

    entry: "PATTERN=TYPE" of --tensor-type, the pattern put in lower case and searched anywhere in the
    tensor's name.
    """
    return finds("search", entry.partition("=")[0].lower(), name)


def readers(manifest: Manifest) -> list[Reader]:
    """llama.cpp with its names of the decoder's tensors.

    Raises ManifestError for a decoder layer, or another weight in 16-bit, that it has no tensor for.
    """
    return [Reader("llama.cpp", rule, gguf_tensors(manifest))]


def lists(manifest: Manifest, readers: Sequence[Reader]) -> Iterable[list[str]]:
    """Values of --tensor-type."""
    yield [f"^{re.escape(name)}$={_half(manifest)}" for name in kept_names(readers)]


def _half(manifest: Manifest) -> str:
    return {"bfloat16": "bf16", "float16": "f16"}[manifest.format.compute_dtype]


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """The command line, over several lines."""
    half = _half(manifest)
    # The embedding is no linear and so in 16-bit here; a tied head is the embedding in a GGUF file.
    options = [f"--token-embedding-type {half}"]
    options += [f"--output-tensor-type {half}"] if _keeps_own_head(manifest) else []
    options += [f"--tensor-type {shlex.quote(entry)}" for entry in entries]
    lines = ["llama-quantize", *options, "model-16bit.gguf model-iq4_nl.gguf IQ4_NL"]
    notes = [
        other_codes("IQ4_NL"),
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
    """By GGUF name of each decoder tensor: whether it stays in 16-bit.

    Output head and embedding, which have options of their own, are not among them.
    """
    found: dict[str, bool] = {}
    outside = _vision_part(manifest)
    for layer in manifest.layers:
        if layer.name in outside or _is_output(layer):
            continue
        stacked = _GGUF_EXPERT.search(layer.name)
        if layer.is_experts and stacked is not None:
            names = (f"blk.{stacked[1]}.{x}.weight" for x in GGUF_EXPERTS[stacked[2]])
            found |= dict.fromkeys(names, not layer.is_four_bit)
            continue
        match = _GGUF_LAYER.search(layer.name)
        if match is None:
            raise ManifestError(
                f"llama.cpp has no tensor for {layer.name} of {manifest.model.architecture}, so its models "
                f"cannot be told about that layer; export to another tool."
            )
        found[f"blk.{match[1]}.{GGUF_LAYERS[match[2]]}.weight"] = not layer.is_four_bit
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
    heads = [x for x in manifest.layers if _is_output(x) and not x.is_four_bit]
    return any(not x.reason.startswith("tied") for x in heads)


def _is_output(layer: ManifestLayer) -> bool:
    return layer.name.rpartition(".")[2] == "lm_head"


def _vision_part(manifest: Manifest) -> frozenset[str]:
    """Names of layers and other weights outside the decoder and its head; a model without vision has none."""
    architecture = manifest.model.architecture
    if VISION not in {tower_of(x.name, architecture, True) for x in manifest.layers}:
        return frozenset()
    towers = {x.name: tower_of(x.name, architecture, True) for x in (*manifest.layers, *manifest.uncovered)}
    return frozenset(name for name, tower in towers.items() if tower in (VISION, PROJECTOR, OTHER))


TARGET = Target(
    name="llama.cpp",
    summary="the command line of llama-quantize, with --tensor-type",
    readers=readers,
    write=write,
    takes_experts=True,
    lists=lists,
    own_codes="with scales of its own for each block, weighted by an importance matrix if it is given one",
)
