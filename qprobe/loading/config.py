"""The transformers config of a model: of its files, or of the catalogue from data alone."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from qprobe.errors import ModelError
from qprobe.loading.source import Source, explained
from qprobe.models.entry import Entry
from qprobe.models.geometry import read_geometry
from qprobe.system.wording import shortened

# How many modules of one kind are built, by the end of the config's name for their number.
_MOST = {re.compile(r"(layer|block|depth|stage)s?$"): 1000, re.compile("experts?$"): 2**14}


def load_config(source: Source) -> Any:
    """The transformers config of `source`.

    Raises ModelError if it cannot be had, and if it takes code that comes with the checkpoint and `source` is
    not trusted to run it.
    """
    from transformers import AutoConfig

    revision = source.revision or "main"
    with explained(source):
        given = _given_config(source, revision)
        _check_code(source, given)
        _check_kernels(source, given)
        _check_counts(source, given)
        # Said in full: left out, transformers would ask on the terminal whether to run the code.
        return AutoConfig.from_pretrained(
            source.location, revision=revision, trust_remote_code=source.trusts_code
        )


def load_generation(source: Source, config: Any) -> Any:
    """The transformers generation config of an encoder-decoder, which may say how its decoder begins.

    None for any other model, and where `source` has none.
    """
    from transformers import GenerationConfig

    if not getattr(config, "is_encoder_decoder", False):
        return None
    try:
        return GenerationConfig.from_pretrained(source.location, revision=source.revision or "main")
    except (OSError, ValueError):
        return None


def _given_config(source: Source, revision: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        found = PreTrainedConfig.get_config_dict(source.location, revision=revision)[0]
    except TypeError:  # transformers 5.17 takes what the file holds for an object
        found = None
    if not isinstance(found, dict):
        raise ModelError(
            f"The config.json of {source.id!r} is no JSON object with a model_type. Copy the file again."
        )
    return found


def _check_code(source: Source, given: dict[str, Any]) -> None:
    """Raises ModelError if the config is known to code of the checkpoint alone; says once what is ignored."""
    from transformers import CONFIG_MAPPING

    code = given.get("auto_map")
    if not code or source.trusts_code:
        return
    if given.get("model_type") in CONFIG_MAPPING:
        _say(
            f"{source.id} brings code of its own (auto_map in config.json), which is not run: transformers "
            f"has the model type {given['model_type']!r} itself."
        )
        return
    raise ModelError(
        f"Model {source.id!r} exists only as code that its checkpoint brings (model type "
        f"{given.get('model_type')!r}), and qprobe runs no such code unasked. Read it, and pass "
        "--trust-remote-code if you trust it: it can do on this machine whatever you can."
    )


def _check_kernels(source: Source, given: Any) -> None:
    """Raises ModelError for a config that has transformers fetch kernels from the hub, which run as code."""
    if source.trusts_code:
        return
    asked = next(_kernels(given), None)
    if asked is not None:
        raise ModelError(
            f"The config.json of {source.id!r} wants a kernel of the hub ({shortened(asked, 100)!r}), which "
            "is code, and qprobe runs none unasked. Take the entry out, or pass --trust-remote-code if you "
            "trust it."
        )


def _kernels(given: Any) -> Iterator[str]:
    """Names of kernels (owner/name) in a config, of all its parts."""
    if not isinstance(given, dict):
        return
    for key, value in given.items():
        if key.endswith(("attn_implementation", "experts_implementation")):
            values = value.values() if isinstance(value, dict) else (value,)
            yield from (x for x in values if isinstance(x, str) and "/" in x)
        yield from _kernels(value)


def _check_counts(source: Source, given: Any) -> None:
    """Raises ModelError for a number of layers or experts of which building the model would find no end."""
    found = next(_counts(given), None)
    if found is not None:
        key, value, most = found
        raise ModelError(
            f"The config.json of {source.id!r} says {shortened(str(value), 40)} for {shortened(key, 100)}, "
            f"and no more than {most:,} are built. Copy the file again."
        )


def _counts(given: Any) -> Iterator[tuple[str, float, int]]:
    """(name, value, limit) of numbers of modules that are too large in a config, of all its parts."""
    if not isinstance(given, dict):
        return
    for key, value in given.items():
        most = next((most for ends, most in _MOST.items() if ends.search(key)), None)
        for one in value if isinstance(value, list) else (value,):
            if most is not None and isinstance(one, int | float) and one > most:
                yield key, one, most
            yield from _counts(one)


@cache
def _say(sentence: str) -> None:
    """Logs `sentence` once for each process."""
    logging.getLogger("qprobe").warning(sentence)


def model_class(config: Any) -> Any:
    """The class that loads and builds `config`: what its `architectures` names, with its head.

    One of transformers' auto classes where one of them leads to it, else the class itself; of a config that
    names none the auto class for image + text to text, for causal text, or for the bare model.
    Raises ModelError if this transformers has no such class for it.
    """
    import transformers

    wanted = (getattr(config, "architectures", None) or [""])[0]
    for auto in _auto_classes():
        mapped: Any = auto._model_mapping.get(type(config), ())  # the public API has no lookup by config
        names = [x.__name__ for x in (mapped if isinstance(mapped, tuple | list) else (mapped,))]
        if names and wanted in ("", *names):
            return auto
        if wanted and (getattr(config, "auto_map", None) or {}).get(auto.__name__, "").endswith(f".{wanted}"):
            return auto
    named = getattr(transformers, wanted, None)
    if named is not None and getattr(named, "config_class", None) is type(config):
        return named
    raise ModelError(
        f"Its config.json names the class {shortened(str(wanted), 100) or '(none)'}, which transformers "
        f"{transformers.__version__} does not have for the model type {config.model_type!r}. Name one that "
        "it has in architectures, or use another transformers."
    )


@cache
def _auto_classes() -> tuple[Any, ...]:
    """The auto classes of transformers' models: those whose choice counts first, then all others by name."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    first = (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel)
    autos = [x for _, x in sorted(vars(modeling_auto).items()) if isinstance(x, type)]
    others = [x for x in autos if getattr(x, "_model_mapping", None) is not None and x not in first]
    return (*first, *others)


def build(config: Any, dtype: Any, trusts_code: bool = False) -> Any:
    """The model of `config`, with random weights on the device that is torch's default. Errors as above."""
    cls = model_class(config)
    if hasattr(cls, "_model_mapping"):
        return cls.from_config(config, dtype=dtype, trust_remote_code=trusts_code)
    return cls._from_config(config, dtype=dtype)


def catalogue_config(entry: Entry) -> Any:
    """The transformers config of a catalogue entry, from data alone."""
    from transformers import AutoConfig

    config = read_geometry(entry.geometry).config
    if config is None:
        from qprobe.demo.folder import demo_folder

        return AutoConfig.from_pretrained(demo_folder(), trust_remote_code=False)
    # transformers fills the dictionaries that it is given, and these are cached.
    return AutoConfig.for_model(**json.loads(json.dumps(config)))
