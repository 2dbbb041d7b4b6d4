"""Entries that keep exactly a manifest's 16-bit layers under the rule of every reader, or an error.

A reader is one tool in one version: its names for the modules that it could turn into 4-bit, and its rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qprobe.errors import ManifestError
from qprobe.exports.matchers import (
    Rule,
    hits,
    transformers_4,
    transformers_5_0,
    transformers_5_21,
)
from qprobe.manifest.records import Manifest, ManifestLayer
from qprobe.models.spellings import Spellings, spellings
from qprobe.system.wording import counted


@dataclass(frozen=True)
class Reader:
    """label: tool and version, as a message names it. keep: by module name there, whether it stays 16-bit."""

    label: str
    rule: Rule
    keep: Mapping[str, bool]


def layer_spellings(manifest: Manifest) -> dict[str, tuple[Spellings, bool]]:
    """By module name: the spellings of every linear and whether it stays in 16-bit, in manifest order.

    Fused weights of experts are no modules, which lists name. Weights that today's transformers never
    converts, though transformers 4 and 5.0 do (subclasses of nn.Linear, the output of nn.MultiheadAttention,
    Conv1D), count as linears that stay.
    """
    architecture = manifest.model.architecture
    found = {
        x.name: (spellings(x.name, x.checkpoint_name, architecture), not x.is_four_bit)
        for x in manifest.layers
        if not x.is_experts
    }
    for weight in manifest.uncovered:
        if weight.name.endswith(".weight") and not weight.why.startswith("a convolution"):
            name = weight.name.removesuffix(".weight")
            in_files = _in_files(name, manifest.layers)
            found.setdefault(name, (spellings(name, in_files, architecture), True))
    return found


def _in_files(name: str, layers: Sequence[ManifestLayer]) -> str:
    """The name in the files of a module that the manifest gives only today's name of.

    It is renamed as the listed linear nearest to it in the tree.
    """
    parts = name.split(".")
    if not layers:
        return name
    nearest = max(layers, key=lambda x: _shared(parts, x.name.split(".")))
    today, filed = nearest.name.split("."), nearest.checkpoint_name.split(".")
    tail = _shared(today[::-1], filed[::-1])
    head, head_in_files = today[: len(today) - tail], filed[: len(filed) - tail]
    return ".".join([*head_in_files, *parts[len(head) :]]) if parts[: len(head)] == head else name


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def reader(manifest: Manifest, label: str, rule: Rule, spelling: Callable[[Spellings], str]) -> Reader:
    """The reader that calls each linear by `spelling`."""
    keep = {spelling(names): kept for names, kept in layer_spellings(manifest).values()}
    return Reader(label, rule, keep)


def transformers_readers(manifest: Manifest) -> list[Reader]:
    """transformers 5 under its two rules, with the names of its first and its present versions."""
    return [
        reader(manifest, "transformers 5.21 or newer", transformers_5_21, lambda x: x.name),
        reader(manifest, "transformers 5.0 to 5.20", transformers_5_0, lambda x: x.name),
        reader(manifest, "transformers 5.0", transformers_5_0, lambda x: x.wrapped),
    ]


def transformers_4_readers(manifest: Manifest) -> list[Reader]:
    """transformers 4.52 to 4.57, and 4.51 and before with the names of the files on the hub."""
    return [
        reader(manifest, "transformers 4.52 to 4.57", transformers_4, lambda x: x.wrapped),
        reader(manifest, "transformers 4.51 and before", transformers_4, lambda x: x.legacy),
    ]


def module_readers(manifest: Manifest, rule: Rule, tool: str) -> list[Reader]:
    """A tool that calls modules as the transformers it runs on does, today's or 5.0."""
    return [
        reader(manifest, f"{tool} on today's transformers", rule, lambda x: x.name),
        reader(manifest, f"{tool} on transformers 5.0", rule, lambda x: x.wrapped),
    ]


def exact(name: str) -> str:
    """A regular expression that matches `name` alone, also where the rule lets a match end anywhere."""
    return f"^{re.escape(name)}$"


def kept_names(readers: Sequence[Reader]) -> list[str]:
    """Each name that stays in 16-bit for one of `readers`, once."""
    return list(dict.fromkeys(name for one in readers for name, kept in one.keep.items() if kept))


def exact_entries(readers: Sequence[Reader], *writings: Callable[[str], str]) -> list[str]:
    """Entries under which every reader keeps exactly its layers.

    writings: how a name may be written, the plainest first; the first that is right for every reader is used
    for the whole list. Raises ManifestError, naming entry and layer, if none is.
    """
    return first_exact(([write(name) for name in kept_names(readers)] for write in writings), readers)


def first_exact(lists: Iterable[list[str]], readers: Sequence[Reader]) -> list[str]:
    """The first of `lists` under which every reader keeps exactly its layers.

    Raises the ManifestError of the first list, which is the plainest, if none is.
    """
    error: ManifestError | None = None
    for entries in lists:
        try:
            check_entries(entries, readers)
        except ManifestError as wrong:
            error = error or wrong
        else:
            return entries
    assert error is not None, "no way of writing was given"
    raise error


def check_entries(entries: Iterable[str], readers: Sequence[Reader]) -> None:
    """Raises ManifestError unless under each reader the entries keep exactly what they must.

    The message names the entry that matches a layer too many, or nothing anywhere, or the layer that no entry
    keeps.
    """
    listed = list(entries)
    used: set[str] = set()
    for one in readers:
        kept: set[str] = set()
        for entry in listed:
            found = hits(one.rule, entry, one.keep)
            kept.update(found)
            if found:
                used.add(entry)
            extra = [name for name in found if not one.keep[name]]
            if extra:
                raise ManifestError(_too_much(entry, found, extra, one))
        missed = [name for name, must in one.keep.items() if must and name not in kept]
        if missed:
            raise ManifestError(_missed(listed, missed, one))
    dead = [entry for entry in listed if entry not in used]
    if dead:
        raise ManifestError(
            f"The entry {dead[0]!r} matches no linear layer under {_and(readers)}, so what it means to keep "
            f"would go to 4-bit; names differ between versions, take them from the manifest."
        )


def _too_much(entry: str, found: Sequence[str], extra: Sequence[str], one: Reader) -> str:
    return (
        f"Under {one.label} the entry {entry!r} keeps {counted(len(found), 'layer')} in 16-bit, "
        f"{len(extra)} of them unwanted, first {extra[0]}; name each layer in full, or keep those layers as "
        f"well."
    )


def _missed(entries: Sequence[str], missed: Sequence[str], one: Reader) -> str:
    several = (
        f"none of the {len(entries)} entries matches" if len(entries) > 1 else "the only entry does not match"
    )
    what = several if entries else "the empty list does not name"
    replaced = (
        " A list replaces the tool's own default, so the head must be named." if _is_head(missed) else ""
    )
    return (
        f"Under {one.label} {what} {missed[0]}, so {counted(len(missed), 'layer')} that must stay in 16-bit "
        f"would go to 4-bit.{replaced} Take the names from the manifest."
    )


def _is_head(names: Sequence[str]) -> bool:
    return any(name.rpartition(".")[2] == "lm_head" for name in names)


def _and(readers: Sequence[Reader]) -> str:
    return " and ".join(x.label for x in readers)


def one_pattern(names: Iterable[str]) -> str:
    """One regular expression whose full matches are exactly `names`; layer numbers share a branch.

    Names that differ only in their first number, or only behind it for the same numbers, are written once.
    """
    numbers: dict[tuple[str, str], list[str]] = {}
    single: list[str] = []
    for name in dict.fromkeys(names):
        match = re.fullmatch(r"((?:[^.]+\.)*?)(\d+)(\..+)", name)
        if match is None:
            single.append(name)
        else:
            numbers.setdefault((match[1], match[3]), []).append(match[2])
    shared: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (before, after), found in numbers.items():
        shared.setdefault((before, tuple(found)), []).append(after)
    branches = [re.escape(name) for name in single]
    branches += [
        re.escape(before) + _any(found) + _any([re.escape(x) for x in after])
        for (before, found), after in shared.items()
    ]
    return "|".join(branches)


def _any(alternatives: Sequence[str]) -> str:
    return alternatives[0] if len(alternatives) == 1 else f"(?:{'|'.join(alternatives)})"
