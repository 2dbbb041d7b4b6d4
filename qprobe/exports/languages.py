"""The languages in which tools write what stays in 16-bit: where entries lie, and how they are read."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from qprobe.errors import ManifestError
from qprobe.exports.matchers import Rule, finds, transformers_rule
from qprobe.exports.targets import autoround, gptqmodel, llm_compressor
from qprobe.system.wording import named, shortened

MAX_TEXT = 2**20  # characters of YAML or Python, whose parsers are slow


@dataclass(frozen=True)
class Language:
    """label: whose rule it is, in words. keys: of the config; entries lie under the first that is there.

    entries: (those that keep layers, those that say something else), from the value of the key. rule_for: the
    rule, given the names of all modules.
    """

    label: str
    keys: tuple[str, ...]
    rule_for: Callable[[Collection[str]], Rule]
    entries: Callable[[Any], tuple[Any, list[str]]] = lambda value: (value, [])
    is_transformers: bool = False


def _wildcards(entry: str, name: str) -> bool:
    """ModelOpt 0.47, for `ignore` and `exclude_modules`: a whole name, in which * stands for anything."""
    return finds("fullmatch", re.escape(entry).replace(r"\*", ".*"), name)


def _within(entry: str, name: str) -> bool:
    """AutoAWQ 0.2.9, utils/module.py, `exclude_layers_to_not_quantize`: any stretch of the name."""
    return entry in name


def _autoround(names: Collection[str]) -> Rule:
    """A key that is a module's name means that module; any other one is a pattern, see the export target."""
    return lambda entry, name: entry == name if entry in names else autoround.rule(entry, name)


def _left_alone(value: Any) -> tuple[Any, list[str]]:
    """Of GPTQModel's `dynamic`: the keys that leave modules alone, and those that change something else."""
    keys = list(value) if isinstance(value, dict) else value
    if not isinstance(keys, list) or not all(isinstance(x, str) for x in keys):
        return value, []
    return [x for x in keys if x.startswith("-:")], [x for x in keys if not x.startswith("-:")]


def _in_16bit(value: Any) -> tuple[Any, list[str]]:
    """Of AutoRound's config by layer: the keys with 16 bits or more, and the others."""
    if not isinstance(value, dict):
        return value, []
    bits = {key: x.get("bits") if isinstance(x, dict) else None for key, x in value.items()}
    kept = [key for key, count in bits.items() if isinstance(count, int) and count >= 16]
    return kept, [str(key) for key in value if key not in kept]


def _always(rule: Rule) -> Callable[[Collection[str]], Rule]:
    return lambda names: rule


def _exactly(entry: str, name: str) -> bool:
    return entry == name


# The two keys under which transformers configs keep such a list; the first is bitsandbytes'.
LIST_KEYS = ("llm_int8_skip_modules", "modules_to_not_convert")
_AWQ = Language("AutoAWQ", LIST_KEYS[1:], _always(_within))
_GPTQMODEL = Language("GPTQModel", ("dynamic",), _always(gptqmodel.rule), _left_alone)
_AUTOROUND = Language("AutoRound", ("extra_config", "layer_config"), _autoround, _in_16bit)
_MODELOPT = Language("ModelOpt", ("ignore", "exclude_modules"), _always(_wildcards))
_COMPRESSED = Language("compressed-tensors", ("ignore",), _always(llm_compressor.rule))
_PEFT = Language("qprobe's export for peft", ("layers_16bit",), _always(_exactly))
# What the names of keys under which other tools keep lists have in common.
_LISTS = re.compile(r"ignore|exclu|skip|not_convert|dynamic|extra_config|layer_config|keep|unquantized")
_NO_LISTS = ("llm_int8_enable_fp32_cpu_offload",)


def transformers_language(release: str | None) -> Language:
    """That of transformers `release`, today's where it is None."""
    label, rule = transformers_rule(release)
    return Language(label, LIST_KEYS, _always(rule), is_transformers=True)


def language_of(config: Mapping[str, Any], release: str | None) -> Language:
    """The language of the list in `config`, a quantization_config or what `export` wrote.

    release: of transformers, which the file names. Raises ManifestError for a list in one that is not known.
    """
    method = str(config.get("quant_method") or "")
    ours = transformers_language(release)
    if method == "awq" and not config.get(LIST_KEYS[0]):
        ours = _AWQ
    by_wildcards = method.startswith("modelopt") or "exclude_modules" in config
    known = (ours, _GPTQMODEL, _AUTOROUND, _MODELOPT if by_wildcards else _COMPRESSED, _PEFT)
    found = next((x for x in known if any(config.get(key) for key in x.keys)), None)
    unknown = [key for key in config if _LISTS.search(key) and config[key] and key not in _NO_LISTS]
    if found is not None:
        unknown = [key for key in unknown if key not in found.keys]
    if unknown:
        raise ManifestError(
            f"The config says under {shortened(named(unknown), 200)} what stays in 16-bit, in a language of "
            f"{shortened(method, 40) or 'a tool'} that is not known here"
            f"{'' if found is None else f' beside that of {found.label}'}. Pass the names of those layers "
            "as a JSON list."
        )
    return found or ours


def from_text(text: str) -> dict[str, Any] | None:
    """The config in YAML or Python that `export` writes; None where `text` is neither."""
    if len(text) > MAX_TEXT:
        return None
    try:
        for step in ast.parse(text).body:
            if isinstance(step, ast.Assign) and getattr(step.targets[0], "id", "") == "skip_modules":
                return _of_python(text, ast.literal_eval(step.value))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    config = found.get("bnb_config_kwargs") if isinstance(found, dict) else None
    if not isinstance(config, dict):
        return None
    dtype = "float16" if found.get("fp16") else "bfloat16"
    return {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype, **config}


def _of_python(text: str, entries: Any) -> dict[str, Any]:
    """The keywords of BitsAndBytesConfig in a snippet, literals alone."""
    calls = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.Call)]
    keywords = [k for x in calls if getattr(x.func, "id", "") == "BitsAndBytesConfig" for k in x.keywords]
    said = {k.arg: k.value.value for k in keywords if k.arg and isinstance(k.value, ast.Constant)}
    return {**said, LIST_KEYS[0]: entries}
