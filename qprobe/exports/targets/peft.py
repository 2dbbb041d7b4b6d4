"""peft 0.21.2: `target_modules` for LoraConfig as one regular expression, and which layers are 4-bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from qprobe.exports.keys import Reader, first_exact, kept_names, one_pattern
from qprobe.exports.matchers import finds
from qprobe.exports.target import Target, Written
from qprobe.manifest.records import Manifest
from qprobe.models.adapting import FUSED, adapted_layers
from qprobe.options import DEFAULT_ADAPT
from qprobe.system.wording import named


def rule(entry: str, name: str) -> bool:
    """peft 0.21.2, utils/other.py, `match_target_against_key`, for `target_modules` given as one string."""
    return finds("fullmatch", entry, name)


def readers(manifest: Manifest, adapt: str = DEFAULT_ADAPT) -> list[Reader]:
    """peft, for which an entry does not keep a layer but puts an adapter on it, where `adapt` says."""
    names = set(adapted_layers(manifest, adapt).names)
    return [Reader("peft", rule, {x.name: x.name in names for x in manifest.layers if not x.is_experts})]


def lists(manifest: Manifest, readers: Sequence[Reader]) -> Iterable[list[str]]:
    """One pattern for all."""
    yield [one_pattern(kept_names(readers))]


def target_pattern(manifest: Manifest, adapt: str = DEFAULT_ADAPT) -> str:
    """One regular expression that peft matches to exactly the linear layers that `adapt` says."""
    found = readers(manifest, adapt)
    (pattern,) = first_exact(lists(manifest, found), found)
    return pattern


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """A JSON object."""
    (pattern,) = entries
    kept = {x.name: not x.is_four_bit for x in manifest.layers}
    experts = [x.name for x in manifest.layers if x.is_experts]
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
            *([f"No adapter on {named(experts)} ({len(experts)} in all): {FUSED}."] if experts else []),
        ),
    )


def adapting(adapt: str) -> Target:
    """The target with adapters where `adapt` says, see `qprobe.models.adapting`."""
    return replace(TARGET, readers=partial(readers, adapt=adapt))


TARGET = Target(
    name="peft",
    summary="target_modules as one pattern, and which layers are 4-bit",
    readers=readers,
    write=write,
    lists=lists,
    of_checkpoint=True,
    takes_experts=True,
    adapting=adapting,
)
