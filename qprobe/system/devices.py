"""A device as a command names it, which need not be here; no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qprobe.errors import MachineError

SPREAD = "auto"
"""The device that is every GPU there is."""

_ONE = re.compile(r"(cpu|cuda)(?::([0-9]{1,3}))?")


@dataclass(frozen=True)
class AskedDevice:
    """A device as it was asked for.

    kind: None for the best there is, "auto" for all GPUs. index: None for the first CPU or current GPU.
    cards: the GPUs that these two may take, by number; None for all.
    """

    kind: Literal["cpu", "cuda", "auto"] | None = None
    index: int | None = None
    cards: tuple[int, ...] | None = None

    @property
    def one(self) -> AskedDevice:
        """It for what runs on one device: the best there is, or the first of `cards`, in place of several."""
        if self.cards:
            return AskedDevice("cuda", self.cards[0])
        return BEST if self.kind == SPREAD else self

    @property
    def may_be_all(self) -> bool:
        """True if a model may be spread over all GPUs."""
        return self.kind in (None, SPREAD)

    def __str__(self) -> str:
        """As it is typed."""
        return (self.kind or "") if self.index is None else f"{self.kind}:{self.index}"


BEST = AskedDevice()


def parse_device(text: str | None) -> AskedDevice:
    """The device that `text` names; None for the best there is. Raises MachineError for another word."""
    if text is None or text == SPREAD:
        return AskedDevice(text)
    named = _ONE.fullmatch(text) if isinstance(text, str) else None
    if named is None:
        raise MachineError(
            f"Device {text!r} is not a device name that qprobe takes. Use cpu, cuda or cuda:1."
        )
    index = None if named[2] is None else int(named[2])
    return AskedDevice("cpu" if named[1] == "cpu" else "cuda", index)
