"""peft 0.21.2: `target_modules` for LoraConfig as one regular expression, and which layers are 4-bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from qprobe.errors import ManifestError
from qprobe.exports.keys import Reader, first_exact, kept_names, one_pattern
from qprobe.exports.matchers import finds
from qprobe.exports.target import Target, Written
from qprobe.manifest.records import Manifest


def rule(entry: str, name: str) -> bool:
    """peft 0.21.2, utils/other.py, `match_target_against_key`, for `target_modules` given as one string."""
    return finds("fullmatch", entry, name)


def readers(manifest: Manifest) -> list[Reader]:
    """peft, for which an entry does not keep a layer but puts an adapter on it: on all linears but the
    output head and tied weights."""
    adapted = {x.name: not _is_head(x.name, x.reason) for x in manifest.layers if not x.is_experts}
    if not any(adapted.values()):
        raise ManifestError(
            "The manifest lists no layer that an adapter could go on; scan a model with linear layers."
        )
    return [Reader("peft", rule, adapted)]


def _is_head(name: str, reason: str) -> bool:
    """The reasons are those that `select` writes for layers that are never quantized."""
    return name.rpartition(".")[2] in ("lm_head", "embed_out") or reason.startswith(("lm_head", "tied"))


def lists(manifest: Manifest, readers: Sequence[Reader]) -> Iterable[list[str]]:
    """One pattern for all."""
    yield [one_pattern(kept_names(readers))]


def target_pattern(manifest: Manifest) -> str:
    """One regular expression that peft matches to every linear layer but the output head and tied weights."""
    found = readers(manifest)
    (pattern,) = first_exact(lists(manifest, found), found)
    return pattern


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """A JSON object."""
    (pattern,) = entries
    kept = {x.name: not x.is_four_bit for x in manifest.layers}
    data = {
        "target_modules": pattern,
        "layers_4bit": [name for name, is_kept in kept.items() if not is_kept],
        "layers_16bit": [name for name, is_kept in kept.items() if is_kept],
    }
    return Written(
        json.dumps(data, indent=2) + "\n",
        (
            "LoraConfig(target_modules=...) takes the string as it is; a list would be read as endings.",
            "peft.prepare_model_for_kbit_training turns 16-bit into float32, the kept layers too.",
        ),
    )


TARGET = Target(
    name="peft",
    summary="target_modules as one pattern, and which layers are 4-bit",
    readers=readers,
    write=write,
    lists=lists,
    of_checkpoint=True,
    takes_experts=True,
)
