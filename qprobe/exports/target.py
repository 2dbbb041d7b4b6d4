"""What an export target declares: one tool in whose language a skip-list can be written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qprobe.exports.keys import Reader, exact, kept_names
from qprobe.manifest.records import Manifest
from qprobe.registry.precisions import NF4


class Written(NamedTuple):
    """What a writer made: the text, and sentences for its user."""

    text: str
    notes: tuple[str, ...] = ()


# Ways to write one list, the plainest first; the first that is exact for every reader is taken.
Lists = Callable[[Manifest, Sequence[Reader]], Iterable[list[str]]]


def written_as(*writings: Callable[[str], str]) -> Lists:
    """The names that stay in 16-bit, all by the first of `writings`, or all by the next, ..."""

    def lists(manifest: Manifest, readers: Sequence[Reader]) -> Iterable[list[str]]:
        return ([write(name) for name in kept_names(readers)] for write in writings)

    return lists


PLAIN_OR_ANCHORED = written_as(str, exact)


@dataclass(frozen=True)
class Target:
    """One file of `targets/`.

    name: as `--to` takes it. summary: what is written, in one line of help.
    readers: who reads the list: the tool in each version that differs, with its rule and its names of the
    modules. Raises ManifestError for a manifest that the tool cannot be told.
    write: from the checked entries to the text. lists: how the entries may be written.
    adapting: for tools that are told where adapters go, the target that tells them other places, see
    `qprobe.models.adapting`.
    of_checkpoint: the tool works on a model that is in 4-bit already; all others make it from 16-bit weights.
    own_codes: how it chooses 4-bit codes, if not by rounding to nearest in the manifest's precision.
    takes_experts: it can be told of fused experts in 4-bit, or they do not concern it; else they are refused.
    precisions: the 4-bit precisions it can be told about; a manifest in another is refused.
    """

    name: str
    summary: str
    readers: Callable[[Manifest], list[Reader]]
    write: Callable[[Manifest, Sequence[str]], Written]
    lists: Lists = PLAIN_OR_ANCHORED
    of_checkpoint: bool = False
    own_codes: str | None = None
    precisions: tuple[str, ...] = (NF4.name,)
    takes_experts: bool = False
    adapting: Callable[[str], Target] | None = None
