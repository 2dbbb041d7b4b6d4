"""Skip-lists from other tools: what their files hold, and which layers of a model they keep; no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

from qprobe.errors import ManifestError
from qprobe.exports.config_format import four_bit_format, is_four_bit, model_dtype
from qprobe.exports.languages import (
    LIST_KEYS,
    Language,
    from_text,
    language_of,
    transformers_language,
)
from qprobe.exports.matchers import all_hits, hits, running_rule
from qprobe.models.spellings import spellings
from qprobe.records import FormatSpec, Inventory
from qprobe.registry.precisions import measurable
from qprobe.system.foreign import read_foreign
from qprobe.system.wording import counted, named, shortened

_OTHER_KEYS = ("dynamic", "extra_config", "layer_config", "ignore", "exclude_modules", "layers_16bit")
MAX_FILE_BYTES = 32 * 2**20  # which JSON can make a GiB of
MOST_ENTRIES = 50_000  # a model with unstacked experts has some 20,000 linears
LONGEST_ENTRY = 10_000
MOST_SECONDS = 3.0  # for what today's transformers makes of a list


@dataclass(frozen=True)
class Matched:
    """One entry of the list and the layers (module names) that it keeps; none for a dead one."""

    entry: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class GivenList:
    """A list as its file gives it. entries: None where the file leaves that to transformers."""

    entries: tuple[str, ...] | None
    language: Language
    format: FormatSpec
    notes: tuple[str, ...] = ()


def read_list(path: Path) -> GivenList:
    """The list that the file `path` holds. Raises ManifestError if it holds none."""
    data = _json(path)
    if isinstance(data, list):
        return GivenList(_names(data, path), transformers_language(None), FormatSpec())
    config = data.get("quantization_config", data) if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(data.get("quantization"), dict):
        config = data["quantization"]  # ModelOpt's hf_quant_config.json
    is_config = isinstance(config, dict) and (
        "quantization_config" in data or any(key in config for key in (*LIST_KEYS, *_OTHER_KEYS))
    )
    if not isinstance(config, dict) or not is_config:
        raise ManifestError(
            f"{path} holds neither a quantization_config nor a JSON list of names, so there is no skip-list "
            f"in it; pass the config.json of a quantized checkpoint."
        )
    version = data.get("transformers_version")
    language = language_of(config, version if isinstance(version, str) else None)
    key = next((key for key in language.keys if config.get(key) is not None), None)
    spec, notes = _format(config, data, path)
    if key is None:
        return GivenList(None, language, spec, notes)
    entries, others = language.entries(config[key])
    if others:
        which = named([shortened(repr(x), 80) for x in others])
        notes += (
            f"Entries of {key} say something else than 16-bit: {which}. "
            "A manifest cannot, so what they match is in 4-bit, as all that is not listed.",
        )
    return GivenList(_names(entries, path), language, spec, notes)


def _json(path: Path) -> Any:
    data = read_foreign(path, ManifestError, "Pass a config.json or a JSON list.", MAX_FILE_BYTES)
    try:
        return json.loads(data.decode("utf-8"))  # not strictly: configs of some models hold Infinity
    except (ValueError, RecursionError) as error:
        written = from_text(data.decode("utf-8", "replace"))
        if written is not None:
            return written
        raise ManifestError(
            f"{path} is no valid JSON ({error}); pass a config.json, a JSON list, or what qprobe export "
            "wrote as YAML or Python."
        ) from error


def _names(value: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(x, str) and x for x in value):
        raise ManifestError(f"The list in {path} must hold module names, each a string that is not empty.")
    if len(value) > MOST_ENTRIES or any(len(x) > LONGEST_ENTRY for x in value):
        raise ManifestError(
            f"The list in {path} has {len(value):,} entries, the longest of {max(map(len, value)):,} "
            f"characters; a skip-list has up to {MOST_ENTRIES:,} of {LONGEST_ENTRY:,}. Pass one that was "
            "made for a model."
        )
    return tuple(dict.fromkeys(value))


def _format(
    quantization: dict[str, Any], config: dict[str, Any], path: Path
) -> tuple[FormatSpec, tuple[str, ...]]:
    """Format of a quantization_config in `config`; what a manifest cannot say is replaced, with a note.

    Raises ManifestError for FP4, whose bytes a manifest could not tell.
    """
    if not is_four_bit(quantization):
        return FormatSpec(), (
            "The list was made for another format; the manifest uses NF4 for what it quantizes.",
        )
    said = str(quantization.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    dtype = said if said == "float16" or said == "bfloat16" else model_dtype(config)
    spec = four_bit_format(quantization, dtype)
    if spec.name not in [x.name for x in measurable()]:
        named = "bnb_4bit_quant_type" in quantization
        how = "" if named else ", since it names no bnb_4bit_quant_type"
        raise ManifestError(
            f"The config in {path} means {shortened(spec.name.upper(), 40)}{how}, and a manifest describes "
            f"NF4 only. Pass its list alone, as a JSON list of names, to see what it keeps beside NF4."
        )
    if said == dtype:
        return spec, ()
    how = "" if "bnb_4bit_compute_dtype" in quantization else ", since it names no bnb_4bit_compute_dtype"
    return spec, (f"The config computes in {shortened(said, 40)}{how}; the manifest computes in {dtype}.",)


def match_list(
    entries: Sequence[str], inventory: Inventory, language: Language, architecture: str
) -> tuple[Matched, ...]:
    """What each entry keeps, whichever of a layer's names it was written for."""
    names = {x.name: spellings(x.name, x.checkpoint_name, architecture).all for x in inventory.layers}
    every = list(dict.fromkeys(spelling for known in names.values() for spelling in known))
    rule = language.rule_for(frozenset(every))
    return tuple(
        Matched(entry, tuple(name for name, known in names.items() if not found.isdisjoint(known)))
        for entry, found in zip(entries, map(frozenset, all_hits(rule, entries, every)), strict=True)
    )


def remarks(
    published: GivenList, matched: Sequence[Matched], inventory: Inventory, kept: frozenset[str]
) -> list[str]:
    """Sentences that whoever imports the list must see.

    matched: what its entries keep. kept: the layers that they keep together.
    """
    said = []
    if published.entries is None:
        said.append("The config holds no list, so its reader keeps its default: head and tied weights.")
    dead = [repr(x.entry) for x in matched if not x.layers]
    if dead:
        said.append(
            f"{len(dead)} of {len(matched)} entries {'matches' if len(dead) == 1 else 'match'} nothing in "
            f"this model: {', '.join(dead)}."
        )
    today, unread = _read_today(matched, inventory) if published.language.is_transformers else (kept, [])
    if unread:
        said.append(
            f"Today's transformers reads an entry as a regular expression, and cannot read "
            f"{named([shortened(repr(x), 80) for x in unread])}, so it would not load with "
            f"this list; export the manifest instead."
        )
    elif matched and today != kept:
        said.append(
            f"Handed to today's transformers as it stands, the list would keep {len(today & kept)} of these "
            f"{counted(len(kept), 'layer')} and {counted(len(today - kept), 'other')}; export the manifest "
            f"instead."
        )
    dropped = [x.name for x in inventory.layers if x.fixed and x.name not in kept]
    if dropped and published.entries is not None:
        said.append(
            f"The list does not name {', '.join(dropped)}, so its reader would put it into 4-bit; the "
            f"manifest keeps it in 16-bit."
        )
    return said


def _read_today(matched: Sequence[Matched], inventory: Inventory) -> tuple[set[str], list[str]]:
    """(layers, entries): what today's transformers keeps by these entries, and those that it cannot read."""
    rule, names, unread = running_rule(), [x.name for x in inventory.layers], []
    today: set[str] = set()
    start = process_time()
    for one in matched:
        try:
            if process_time() - start > MOST_SECONDS:  # then nobody will want to load with it
                raise ManifestError("no time left")
            today.update(hits(rule, one.entry, names))
        except ManifestError:
            unread.append(one.entry)
    return today, unread
