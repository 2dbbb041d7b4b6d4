"""Batches run in halves where memory does not suffice for them, and that is told."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from qprobe.errors import is_out_of_memory

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Halving:
    """Of each kind of work how many items ran at once, once memory did not suffice for more.

    most: by kind, (so many at once, of a batch of so many).
    """

    most: dict[str, tuple[int, int]] = field(default_factory=dict)

    def run(
        self, kind: str, items: Sequence[Item], work: Callable[[Sequence[Item]], Found]
    ) -> list[tuple[Sequence[Item], Found]]:
        """Parts of `items`, in order, each with what `work` gives of it: one part unless memory runs out.

        After that, this kind runs in parts as small at once. Raises what `work` does, also if memory does not
        suffice for one item.
        """
        found: list[tuple[Sequence[Item], Found]] = []
        done = 0
        while done < len(items):
            size, largest = self.most.get(kind, (len(items), 0))
            part = items[done : done + size]
            try:
                found.append((part, work(part)))
            except Exception as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            else:
                done += len(part)
                continue
            # Outside of the handler: the traceback holds what the batch computed.
            free_memory()
            self.most[kind] = (len(part) + 1) // 2, max(len(items), largest)
        return found

    def run_all(
        self, kind: str, groups: Sequence[Sequence[Item]], work: Callable[[Sequence[Sequence[Item]]], Found]
    ) -> Found:
        """What `work` gives of `groups`, or, where memory does not suffice, of all of them in halves."""
        size = max((len(group) for group in groups), default=1)
        while True:
            parts = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
            try:
                return work(parts)
            except Exception as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            free_memory()
            size = (size + 1) // 2
            self.most[kind] = size, max(map(len, groups))

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence that says so, if memory ever did not suffice."""
        if not self.most:
            return ()
        shown = ", ".join(f"{size} at once for {kind}" for kind, (size, _) in sorted(self.most.items()))
        asked = max(of for _, of in self.most.values())
        return (
            f"Memory did not suffice for batches of {asked}, so they ran in parts ({shown}); last digits may "
            "differ from those of a run with enough.",
        )


def free_memory() -> None:
    """Gives back what a batch or a model held that is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
