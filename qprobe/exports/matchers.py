"""How each tool reads an entry of a skip-list: pure functions, each with its source, no torch.

A rule answers for one entry and one module name: does this entry keep this module in 16-bit? A list keeps
what any of its entries keeps; every tool here joins its entries so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.metadata import version

from packaging.version import InvalidVersion, Version

from qprobe.errors import ManifestError

Rule = Callable[[str, str], bool]


def transformers_4(entry: str, name: str) -> bool:
    """transformers 4.51.3 to 4.57.6, integrations/bitsandbytes.py, `_replace_with_bnb_linear`.

    The entry is plain text: the module's last part, or the whole name, or any stretch of it before a dot.
    """
    return entry == name.rpartition(".")[2] or f"{entry}." in name or entry == name


def transformers_5_0(entry: str, name: str) -> bool:
    """transformers 5.0.0 to 5.20.0, quantizers/quantizers_utils.py, `should_convert_module`.

    The entry is a regular expression that may end anywhere in the name, or a bare ending of it.
    """
    return re.match(entry, name) is not None or name.endswith(entry)


def transformers_5_21(entry: str, name: str) -> bool:
    """transformers 5.21.1 to 5.23.0, quantizers/quantizers_utils.py, `should_convert_module`.

    The entry is a regular expression that ends at a dot or at the end, or still a bare ending of the name.
    """
    return re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) is not None or name.endswith(entry)


def unsloth(entry: str, name: str) -> bool:
    """unsloth 2026.10.9, models/_utils.py, `patched_should_convert_module`: transformers' rule on aliases."""
    old, new = "language_model.model.", "language_model."
    names = {name, name.replace(old, new)}
    names |= {x.removeprefix("model.") for x in names if x.startswith("model.language_model.")}
    return any(transformers_5_21(e, n) for e in {entry, entry.replace(old, new)} for n in names)


def vllm(entry: str, name: str) -> bool:
    """vLLM 0.19.1, model_executor/layers/quantization/bitsandbytes.py, `is_layer_skipped_bnb`.

    name: vLLM's own, of the fused module (`qkv_proj`). The entry is one whole part of it, or its beginning up
    to a dot.
    """
    return entry in name.split(".") or f"{name}.".startswith(f"{entry}.")


def compressed_tensors(entry: str, name: str) -> bool:
    """compressed-tensors 0.20.0, utils/match.py, `match_name` and `_match_class`, for the `ignore` list.

    Whole name, or a regular expression after "re:" from its start; "Linear" is every linear.
    """
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), name) is not None
    return entry == name or entry in ("Linear", "Module")


def gptqmodel(entry: str, name: str) -> bool:
    """GPTQModel 7.7.0, quantization/config.py, `_resolve_dynamic_override`, for the keys of `dynamic`.

    Only keys that start with "-:" leave a module alone; what follows is a regular expression from the start.
    """
    return entry.startswith("-:") and re.match(entry.removeprefix("-:"), name) is not None


def auto_round(entry: str, name: str) -> bool:
    """AutoRound 0.16.1, compressors/layer_config_resolver.py and utils/common.py, `to_standard_regex`.

    For a key of `layer_config` that is anchored ("^...$"): its dots are plain, the rest is a regular
    expression. Any other key that is no module's exact name is searched anywhere.
    """
    return re.search(entry.replace(".", r"\."), name) is not None


def peft(entry: str, name: str) -> bool:
    """peft 0.21.2, utils/other.py, `match_target_against_key`, for `target_modules` given as one string."""
    return re.fullmatch(entry, name) is not None


def llama_cpp(entry: str, name: str) -> bool:
    """llama.cpp, tools/quantize/quantize.cpp (`parse_tensor_type`) and src/llama-quant.cpp (2026).

    entry: "PATTERN=TYPE" of --tensor-type, the pattern put in lower case and searched anywhere in the
    tensor's name.
    """
    return re.search(entry.partition("=")[0].lower(), name) is not None


def transformers_rule(release: str | None) -> tuple[str, Rule]:
    """(label, rule) of transformers `release`; the current rule where it is None or no version."""
    current = ("transformers 5.21 or newer", transformers_5_21)
    try:
        parsed = Version(release or "")
    except InvalidVersion:
        return current
    if parsed.major < 5:
        return ("transformers 4", transformers_4)
    return current if parsed >= Version("5.21.0.dev0") else ("transformers 5.0 to 5.20", transformers_5_0)


def running_rule() -> Rule:
    """The rule of the transformers that is installed here, which need not be imported for it."""
    return transformers_rule(version("transformers"))[1]


def hits(rule: Rule, entry: str, names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that `entry` keeps. Raises ManifestError if `entry` must be a pattern and is none."""
    try:
        return tuple(name for name in names if rule(entry, name))
    except re.error as error:
        raise ManifestError(
            f"The entry {entry!r} is read as a regular expression and is none ({error}); correct it."
        ) from error
