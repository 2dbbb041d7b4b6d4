"""Samples that bring themselves: photographs that scikit-image ships, and questions for text-only models.

The reference answers them itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qprobe.data.images import file_bytes
from qprobe.errors import SampleError
from qprobe.records import Sample, asked

DEFAULT_PROMPT = "Describe this image in detail."

# Varied kinds that lie in scikit-image's wheel (no download): people, animals, medicine, space, parts,
# documents, textures, products.
PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "ihc.png",
    "hubble_deep_field.jpg", "motorcycle_left.png", "page.png", "coins.png", "camera.png",
    "clock_motion.png", "cell.png", "brick.png", "grass.png", "gravel.png", "horse.png", "moon.png",
    "text.png", "microaneurysms.png",
)  # fmt: skip

QUESTIONS = (
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A shop sells pens at 3 for 2 euros. What do 12 pens cost? Show the steps.",
    "Name the capital cities of France, Japan, Kenya and Peru.",
    "Translate into German: The train leaves at half past seven.",
    "What are the main differences between a virus and a bacterium?",
    "Summarize the water cycle for a ten-year-old child.",
    "Give three reasons why a wooden bridge may fail.",
    "Write a polite e-mail that moves a meeting from Tuesday to Thursday.",
    "Which is larger, 7/9 or 11/14? Explain.",
    "List the ingredients of a simple tomato soup.",
    "What does the SQL statement SELECT COUNT(*) FROM users WHERE age > 30 do?",
    "Describe how a bicycle stays upright.",
    "Correct the grammar: He don't knows where the keys is.",
    "Tell a story of four sentences about a lighthouse keeper.",
    "What is the derivative of x^3 - 4x + 1?",
    "Compare tea and coffee in a table with three rows.",
    "Explain what a heart valve does.",
    "Write a haiku about winter.",
    "How do you find the median of a list of numbers?",
    "What should a first-aid kit in a workshop contain?",
    "Convert 68 degrees Fahrenheit to Celsius.",
    "Who wrote Don Quixote, and what is it about?",
    "Explain the term inflation in one paragraph.",
)


@dataclass(frozen=True)
class Samples:
    """Usable samples, and sentences that a reader must know.

    left_out: one for each row or file that is no sample. share: how many of how many those are, in a
    sentence; None without any.
    """

    samples: tuple[Sample, ...]
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    share: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.left_out, *self.remarks)


def photographs(prompt: str | None = None, limit: int | None = None, offset: int = 0) -> Samples:
    """Photographs that scikit-image ships, from number `offset` on, at most `limit`."""
    from skimage import data_dir

    names = PHOTOGRAPHS[offset:][:limit]
    if not names:
        raise SampleError(f"No photograph is left from number {offset} on; there are {len(PHOTOGRAPHS)}.")
    files = ((name, file_bytes(Path(data_dir) / name)) for name in names)
    return Samples(tuple(Sample(name, asked(prompt or DEFAULT_PROMPT, data)) for name, data in files))


def questions(prompt: str | None = None, limit: int | None = None, offset: int = 0) -> Samples:
    """Text-only samples from number `offset` on, at most `limit`; with `prompt`, that one alone."""
    texts = (prompt,) if prompt else QUESTIONS[offset:][:limit]
    if not texts:
        raise SampleError(
            f"No built-in question is left from number {offset} on; there are {len(QUESTIONS)}."
        )
    return Samples(tuple(Sample(f"question-{offset + i:02d}", asked(text)) for i, text in enumerate(texts)))
