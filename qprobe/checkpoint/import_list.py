"""`qprobe import`: somebody else's skip-list as a manifest, so that it can be compared with ours."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qprobe import __version__
from qprobe.checkpoint.load import Blueprint, draw
from qprobe.errors import ManifestError
from qprobe.exports.config_format import four_bit_format, is_four_bit, model_dtype
from qprobe.exports.matchers import Rule, hits, running_rule, transformers_rule
from qprobe.loading.inventory import fingerprint, list_layers
from qprobe.loading.reference import known, resolve
from qprobe.manifest.records import LayerChoice, MadeBy, Manifest, ManifestBudget, Quality
from qprobe.models.spellings import spellings
from qprobe.records import FormatSpec, Inventory, ModelIdentity
from qprobe.system.wording import counted

# The two keys under which transformers configs keep such a list; the first is bitsandbytes'.
LIST_KEYS = ("llm_int8_skip_modules", "modules_to_not_convert")
MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Matched:
    """One entry of the list and the layers (module names) that it keeps; none for a dead one."""

    entry: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """The manifest, and what matched what. rule: whose reading of the list was used, in words.

    notes: sentences a reader must see. fixed: layers that stay in 16-bit whatever the list says.
    """

    manifest: Manifest
    rule: str
    matched: tuple[Matched, ...]
    notes: tuple[str, ...]
    fixed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `import --json`, without the manifest."""
        return {
            "rule": self.rule,
            "matched": [asdict(x) for x in self.matched],
            "dead": [x.entry for x in self.matched if not x.layers],
            "layers_16bit": list(self.manifest.skip_modules),
            "total_bytes": self.manifest.budget.total_bytes,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class GivenList:
    """A list as its file gives it. entries: None where the file leaves the choice to transformers."""

    entries: tuple[str, ...] | None
    transformers: str | None
    format: FormatSpec
    notes: tuple[str, ...] = ()


def import_list(path: Path | str, model: str, out: Path | str | None = None) -> Imported:
    """The list in the file `path` as a manifest for `model` (alias, hub id or folder).

    path: a config.json with a quantization_config, or a plain JSON list of names. An entry may use today's
    names or those of the files on the hub, and is read by the rule of the transformers that the config names,
    today's for a plain list, which is taken to be for NF4 with double quantization. The output head and tied
    weights stay in 16-bit, as they always do here. out: where the manifest goes, for its record of the
    command.
    Raises ManifestError for a file without a list, one for FP4, or a list of which no entry matches the
    model.
    """
    file = Path(path)
    published = read_list(file)
    blueprint = draw(resolve(model), published.format, known(model))
    inventory = list_layers(blueprint.skeleton, published.format)
    label, rule = transformers_rule(published.transformers)
    matched = match_list(published.entries or (), inventory, rule, type(blueprint.skeleton).__name__)
    if matched and not any(x.layers for x in matched):
        raise ManifestError(
            f"None of the {len(matched)} entries of {file} matches a layer of {blueprint.source.id}, first "
            f"{matched[0].entry!r}; pass the model that the list was made for."
        )
    kept = frozenset(name for one in matched for name in one.layers)
    words = ["qprobe", "import", file.name, "--model", blueprint.source.id]
    command = shlex.join([*words, *(["--out", Path(out).name] if out is not None else [])])
    fixed = tuple(x.name for x in inventory.layers if x.fixed)
    notes = (*published.notes, *_remarks(matched, published, inventory, kept))
    return Imported(_manifest(blueprint, inventory, kept, matched, command), label, matched, notes, fixed)


def match_list(
    entries: Sequence[str], inventory: Inventory, rule: Rule, architecture: str
) -> tuple[Matched, ...]:
    """What each entry keeps, whichever of a layer's names it was written for."""
    names = {x.name: spellings(x.name, x.checkpoint_name, architecture).all for x in inventory.layers}
    return tuple(
        Matched(entry, tuple(name for name, known in names.items() if hits(rule, entry, known)))
        for entry in entries
    )


def read_list(path: Path) -> GivenList:
    """The list that the file `path` holds. Raises ManifestError if it holds none."""
    data = _json(path)
    if isinstance(data, list):
        return GivenList(_names(data, path), None, FormatSpec())
    config = data.get("quantization_config", data) if isinstance(data, dict) else None
    is_config = isinstance(config, dict) and (
        "quantization_config" in data or any(key in config for key in LIST_KEYS)
    )
    if not isinstance(config, dict) or not is_config:
        raise ManifestError(
            f"{path} holds neither a quantization_config nor a JSON list of names, so there is no skip-list "
            f"in it; pass the config.json of a quantized checkpoint."
        )
    key = next((key for key in LIST_KEYS if config.get(key) is not None), None)
    entries = None if key is None else _names(config[key], path)
    version = data.get("transformers_version")
    spec, notes = _format(config, data, path)
    return GivenList(entries, version if isinstance(version, str) else None, spec, notes)


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ManifestError(f"{path} is larger than {MAX_FILE_BYTES // 2**20} MiB, so no list; check it.")
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ManifestError(
            f"{path} cannot be read ({error.strerror}); pass a config.json or a JSON list."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"{path} is no valid JSON ({error}); pass a config.json or a JSON list."
        ) from error


def _names(value: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(x, str) and x for x in value):
        raise ManifestError(f"The list in {path} must hold module names, each a string that is not empty.")
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
    if spec.name != "nf4":
        named = "bnb_4bit_quant_type" in quantization
        how = "" if named else ", since it names no bnb_4bit_quant_type"
        raise ManifestError(
            f"The config in {path} means {spec.name.upper()}{how}, and a manifest describes NF4 only. Pass "
            f"its list alone, as a JSON list of names, to see what it keeps beside NF4."
        )
    if said == dtype:
        return spec, ()
    how = "" if "bnb_4bit_compute_dtype" in quantization else ", since it names no bnb_4bit_compute_dtype"
    return spec, (f"The config computes in {said}{how}; the manifest computes in {dtype}.",)


def _remarks(
    matched: Sequence[Matched], published: GivenList, inventory: Inventory, kept: frozenset[str]
) -> list[str]:
    remarks = []
    if published.entries is None:
        remarks.append("The config holds no list, so transformers keeps its default: head and tied weights.")
    dead = [repr(x.entry) for x in matched if not x.layers]
    if dead:
        remarks.append(
            f"{len(dead)} of {len(matched)} entries {'matches' if len(dead) == 1 else 'match'} nothing in "
            f"this model: {', '.join(dead)}."
        )
    today, unread = _read_today(matched, inventory)
    if unread:
        remarks.append(
            f"Today's transformers reads an entry as a regular expression, and cannot read "
            f"{', '.join(map(repr, unread))}, so it would not load with "
            f"this list; export the manifest instead."
        )
    elif matched and today != kept:
        remarks.append(
            f"Handed to today's transformers as it stands, the list would keep {len(today & kept)} of these "
            f"{counted(len(kept), 'layer')} and {counted(len(today - kept), 'other')}; export the manifest "
            f"instead."
        )
    dropped = [x.name for x in inventory.layers if x.fixed and x.name not in kept]
    if dropped and published.entries is not None:
        remarks.append(
            f"The list does not name {', '.join(dropped)}, so transformers would put it into 4-bit; the "
            f"manifest keeps it in 16-bit."
        )
    return remarks


def _read_today(matched: Sequence[Matched], inventory: Inventory) -> tuple[set[str], list[str]]:
    """(layers, entries): what today's transformers keeps by these entries, and those that it cannot read."""
    rule, names, unread = running_rule(), [x.name for x in inventory.layers], []
    today: set[str] = set()
    for one in matched:
        try:
            today.update(hits(rule, one.entry, names))
        except ManifestError:
            unread.append(one.entry)
    return today, unread


def _manifest(
    blueprint: Blueprint,
    inventory: Inventory,
    kept: frozenset[str],
    matched: Sequence[Matched],
    command: str,
) -> Manifest:
    by_entry = {name: one.entry for one in reversed(matched) for name in one.layers}
    layers = tuple(
        LayerChoice(
            name=x.name,
            checkpoint_name=x.checkpoint_name,
            shape=x.shape,
            precision="bf16" if x.fixed or x.name in kept else "nf4",
            bytes=x.bytes_16bit if x.fixed or x.name in kept else x.bytes_4bit,
            sensitivity_kl=None,
            reason=_reason(x.fixed, by_entry.get(x.name)),
        )
        for x in inventory.layers
    )
    total, standard = inventory.total_bytes(kept), inventory.standard_4bit_bytes
    source = blueprint.source
    return Manifest(
        model=ModelIdentity(
            source.id,
            getattr(blueprint.config, "_commit_hash", None),
            type(blueprint.skeleton).__name__,
            fingerprint(blueprint.skeleton),
        ),
        format=blueprint.format,
        budget=ManifestBudget("imported", max(total, standard), total, standard),
        quality=Quality(),
        layers=layers,
        uncovered=inventory.uncovered,
        skip_modules=tuple(x.name for x in layers if x.precision == "bf16"),
        made_by=MadeBy(__version__, command, datetime.now(UTC).isoformat(timespec="seconds")),
    )


def _reason(fixed: str | None, entry: str | None) -> str:
    if fixed is not None:
        return f"{fixed}: stays in 16-bit"
    return "NF4" if entry is None else f"kept by the imported entry {entry!r}"
