"""The model card of a quantized checkpoint: what it is, what was measured, how to load it."""

from __future__ import annotations

from qprobe.manifest.records import Manifest
from qprobe.system.markdown import code, plain
from qprobe.system.wording import counted

_TASKS = {"ImageTextToText": "image-text-to-text", "CausalLM": "text-generation"}


def model_card(manifest: Manifest, architecture: str, made_from: str | None = None) -> str:
    """README.md (Markdown with a YAML head) of the checkpoint of `manifest`; architecture: its model class.

    Every number is the manifest's; what was not measured is said to be so. made_from: the name of the
    weights, where they are not known to be those that were measured.
    """
    auto = auto_class(architecture)
    name = made_from or manifest.model.id
    parts = [
        f"---\n{_head(manifest, name, auto)}---",
        f"# {plain(name.rpartition('/')[2])}, dynamic 4-bit",
        _summary(manifest, made_from),
        "## Measured",
        *([_elsewhere(manifest, made_from)] if made_from and _has_figures(manifest) else []),
        _quality(manifest, made_from),
        *([_compared(manifest)] if manifest.compared else []),
        "## Use",
        _OURS
        if any(x.is_experts and x.is_four_bit for x in manifest.layers)
        else plain_usage(auto, is_four_bit=True),
        "## Layers in 16-bit",
        _kept(manifest),
        f"Made by qprobe {plain(manifest.made_by.qprobe)} ({code(manifest.made_by.command)}). "
        f"`skiplist.json` in this folder is the manifest: every layer, its precision and its bytes. "
        f"The licence is that of the model it was made from.",
    ]
    return "\n\n".join(parts) + "\n"


def auto_class(architecture: str) -> str:
    """The last words of the auto class that loads `architecture`; "" for a model without a head."""
    from transformers.models.auto import modeling_auto

    for name, names in (
        ("ImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("CausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        if architecture in names.values():
            return name
    return ""


def task_of(auto: str) -> str | None:
    """The hub's name of what a model of the auto class `auto` does."""
    return _TASKS.get(auto)


def _head(manifest: Manifest, name: str, auto: str) -> str:
    return card_head(
        "transformers",
        name,
        ["qprobe", "bitsandbytes", "4-bit", manifest.format.name, "qlora"],
        pipeline_tag=task_of(auto),
    )


def card_head(library: str, base: str, tags: list[str], pipeline_tag: str | None = None) -> str:
    """The YAML between the two lines of dashes; base: the model's name, told if it is one on the hub."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name=library,
        base_model=base if "/" in base else None,
        tags=tags,
        pipeline_tag=pipeline_tag,
    )
    return f"{data.to_yaml()}\n"


def _summary(manifest: Manifest, made_from: str | None) -> str:
    kept, total = len(manifest.skip_modules), len(manifest.layers)
    at = f" at revision {code(manifest.model.revision)}" if manifest.model.revision and not made_from else ""
    double = "with" if manifest.format.double_quant else "without"
    return (
        f"{code(made_from or manifest.model.id)}{at} in bitsandbytes {manifest.format.name.upper()} (blocks "
        f"of {manifest.format.blocksize}, {double} double quantization, computing in "
        f"{manifest.format.compute_dtype}): {total - kept} of {counted(total, 'linear layer')} in 4-bit, "
        f"{kept} in 16-bit."
    )


def _has_figures(manifest: Manifest) -> bool:
    quality = manifest.quality
    return bool(manifest.compared) or any(
        x is not None for x in (quality.kl_standard_4bit, quality.kl_dynamic, quality.kl_predicted)
    )


def _elsewhere(manifest: Manifest, made_from: str) -> str:
    """That the figures need not be those of this checkpoint."""
    what = code(made_from) if made_from != manifest.model.id else "a folder of that name"
    return (
        f"**These figures were measured on the weights of {code(manifest.model.id)} that were scanned.** "
        f"This checkpoint was made from {what}, passed as --model; that the weights are the same was not "
        "checked. `qprobe compare` with the same --model measures them."
    )


def _quality(manifest: Manifest, made_from: str | None) -> str:
    quality, budget = manifest.quality, manifest.budget
    rows = [
        ("standard 4-bit", budget.standard_4bit_bytes, quality.kl_standard_4bit),
        ("**this model**" if made_from is None else "this list", budget.total_bytes, quality.kl_dynamic),
    ]
    lines = [f"| {name} | {size:,} | {_number(kl)} |" for name, size, kl in rows]
    where = (
        f"KL divergence to the 16-bit model on {counted(quality.samples, 'held-out sample')}, nats per "
        f"answer token."
        if quality.samples
        else "The KL divergence to the 16-bit model was not measured for this list."
    )
    table = "\n".join(["| model | bytes | KL |", "|---|---|---|", *lines])
    return f"{table}\n\n{where} Bytes include the quantization state."


def _compared(manifest: Manifest) -> str:
    lines = [
        f"| {plain(x.name)}{' (chosen)' if x.chosen else ''} | {x.total_bytes:,} | {_number(x.kl, x.kl_se)} |"
        for x in manifest.compared
    ]
    head = "Lists that were measured on the same samples, which chose among them:"
    return "\n".join([head, "", "| list | bytes | KL ± standard error |", "|---|---|---|", *lines])


def _number(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.1g}"


_OURS = (
    '```python\nimport qprobe\n\nmodel, processor = qprobe.load_dynamic_4bit("path/to/this/folder")\n```\n\n'
    "Weights of experts are in 4-bit here, which transformers does not read: its `from_pretrained` refuses "
    "this folder. `for_training=True` makes the model ready for adapters on its linear layers; with peft "
    "0.21 the second forward of adapters on 4-bit experts (`target_parameters`) fails."
)


def plain_usage(auto: str, is_four_bit: bool) -> str:
    """How the checkpoint is loaded; auto: of `auto_class`."""
    name = f"AutoModel{'For' if auto else ''}{auto}"
    code = (
        f"```python\nfrom transformers import {name}, AutoProcessor\n\n"
        f'model = {name}.from_pretrained("path/to/this/folder")\n'
        f'processor = AutoProcessor.from_pretrained("path/to/this/folder")\n```'
    )
    if not is_four_bit:
        return f"{code}\n\nIt needs transformers 5, not qprobe."
    return (
        f"{code}\n\n"
        "It needs transformers 5 and bitsandbytes, not qprobe. Pass no `quantization_config` of your own: "
        "the list of layers lies in this folder's config. For training, "
        "`peft.prepare_model_for_kbit_training` would turn everything in 16-bit into float32; "
        '`qprobe.load_dynamic_4bit("skiplist.json", for_training=True)` does not. On CPUs with AVX512-BF16 '
        "bitsandbytes repacks 4-bit layers on their first forward and rounds their scales to bf16, so "
        "answers may differ there by a rounding."
    )


def _kept(manifest: Manifest) -> str:
    reasons = {x.name: x.reason for x in manifest.layers}
    if not manifest.skip_modules:
        return "None."
    lines = [f"- {code(name)}: {plain(reasons[name])}" for name in manifest.skip_modules]
    return "\n".join(lines)
