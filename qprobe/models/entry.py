"""A model known by a short name, and what others published about it."""

from __future__ import annotations

from dataclasses import dataclass

from qprobe.records import Inventory

GATED = "gated on the hub: accept its licence, then `hf auth login`"
OPEN = "open download"


def whole_parts(entry: str, name: str) -> bool:
    """What a reader means by an entry: whole dotted parts of the name, one after another."""
    return f".{entry}." in f".{name}."


@dataclass(frozen=True)
class PublishedList:
    """A hand-made skip-list; `entries` use checkpoint names and match whole dotted components."""

    author: str
    source: str
    entries: tuple[str, ...]

    def kept(self, inventory: Inventory) -> frozenset[str]:
        """Names of the linears that the list keeps in 16-bit."""
        return frozenset(
            x.name for e in self.entries for x in inventory.layers if whole_parts(e, x.checkpoint_name)
        )

    def dead(self, inventory: Inventory) -> tuple[str, ...]:
        """Entries that match no linear of the model."""
        names = [x.checkpoint_name for x in inventory.layers]
        return tuple(e for e in self.entries if not any(whole_parts(e, name) for name in names))


@dataclass(frozen=True)
class PublishedSize:
    """What somebody says a model occupies: parameter bytes without quantization state, in GiB.

    layout: the layout of `qprobe plan` it belongs to; an author's name for that author's list.
    """

    layout: str
    gib: float
    source: str


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue. hub_id is None for a model that qprobe carries itself.

    geometry: name of its file in `geometries`, from which all about its size follows without a network.
    """

    alias: str
    hub_id: str | None
    architecture: str
    note: str
    geometry: str
    published: tuple[PublishedList, ...] = ()
    published_sizes: tuple[PublishedSize, ...] = ()

    @property
    def is_gated(self) -> bool:
        """True if the weights can be had only after accepting a licence on the hub."""
        return self.note == GATED


def on_the_hub(
    architecture: str,
    note: str,
    *models: tuple[str, str, str],
    published: tuple[PublishedList, ...] = (),
    sizes: tuple[PublishedSize, ...] = (),
) -> tuple[Entry, ...]:
    """Entries of `models`, each (alias, hub id, geometry), which share everything else."""
    return tuple(
        Entry(alias, hub_id, architecture, note, geometry, published, sizes)
        for alias, hub_id, geometry in models
    )
