"""What a kind of scene is: a prompt, the parts of its answer, and a drawing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qprobe.demo.draw import Dice


@dataclass(frozen=True)
class Part:
    """A stretch of an answer: one of `texts`, which the scene chooses.

    fact: the name of the fact that this stretch states, or None for fixed words.
    """

    texts: tuple[str, ...]
    fact: str | None = None

    def phrase(self, choice: int) -> str:
        """The text as a fact's phrase: no spaces or punctuation at its ends."""
        return self.texts[choice].strip(" ,.:")


@dataclass(frozen=True)
class SceneStyle:
    """One way to draw scenes of a kind.

    draw: the dice of N scenes -> the clean image (N, 3, SIZE, SIZE) in 0 to 1, and the
    text that each part of the answer chooses, (N, len(parts)) int64.
    """

    kind: str
    prompt: str
    parts: tuple[Part, ...]
    draw: Callable[[Dice], tuple[Tensor, Tensor]]

    def answer(self, choices: list[int]) -> str:
        """The answer in words."""
        return "".join(part.texts[choice] for part, choice in zip(self.parts, choices, strict=True))
